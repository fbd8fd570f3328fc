def test_the_pack_loads_without_a_host():
    import ltx2_gguf

    assert ltx2_gguf.WEB_DIRECTORY
