"""The table of formats against gguf-py's constants."""

import gguf
import pytest
from gguf.constants import GGML_QUANT_SIZES

from ltx2_gguf.quant import formats

ALL = {**formats.FORMATS, **formats.UNDECODABLE}


@pytest.mark.parametrize("name", ALL)
def test_sizes_and_ids_equal_gguf_py(name):
    theirs = gguf.GGMLQuantizationType[name]
    assert ALL[name].ggml_id == int(theirs)
    # gguf-py still lists Q8_1 with two float32 fields (40 bytes); in ggml-common.h they are float16 (36). It occurs in no file.
    expected = (32, 36) if name == "Q8_1" else GGML_QUANT_SIZES[theirs]
    assert (ALL[name].block_size, ALL[name].type_size) == expected


def test_every_type_that_gguf_py_knows_is_in_the_table():
    assert {t.name for t in gguf.GGMLQuantizationType} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_format_is_found_by_its_id(name):
    assert formats.format_by_id(ALL[name].ggml_id) is ALL[name]


def test_an_unknown_id_is_named_with_the_formats_that_work():
    with pytest.raises(formats.UnsupportedFormatError, match="unknown GGML type 99.*Q4_K"):
        formats.format_by_id(99)
    with pytest.raises(formats.UnsupportedFormatError, match="Q4_0_4_4.*withdrawn"):
        formats.format_by_id(31)


@pytest.mark.parametrize("name", formats.UNDECODABLE)
def test_a_known_format_without_decoder_is_named(name):
    with pytest.raises(formats.UnsupportedFormatError, match=f"blk.0.weight is stored as {name}"):
        formats.require_decodable(formats.UNDECODABLE[name], "blk.0.weight")
    with pytest.raises(formats.UnsupportedFormatError, match="known, but"):
        formats.format_by_name(name)


def test_sizes_follow_from_the_fields():
    q4_k = formats.FORMATS["Q4_K"]
    assert (q4_k.type_size, q4_k.bits_per_weight, q4_k.row_bytes(4096)) == (144, 4.5, 2304)
    assert q4_k.packed_shape((3, 5, 512)) == (15, 288)
    assert q4_k.nbytes((3, 5, 512)) == 15 * 288
    assert (q4_k.offset("qs"), q4_k.size("qs")) == (16, 128)
    with pytest.raises(KeyError, match="qh"):
        q4_k.offset("qh")
