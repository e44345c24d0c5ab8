"""The training benchmark includes every mode of transformers and compares with the fastest one."""

from tests.bench.training import Contender, Sample, contenders, training_rows, training_text


def sample(seconds: float, mebibytes: int) -> Sample:
    return Sample(seconds, seconds, 2 * seconds, mebibytes * 2**20, 8.0)


def test_every_mode_of_transformers_is_a_contender() -> None:
    for precision, kinds in (("float32", {"float32"}), ("bf16", {"bf16", "autocast"})):
        listed = contenders(precision)  # type: ignore[arg-type]
        others = {(each.type, each.experts, each.attention) for each in listed if each.name == "transformers"}
        assert others == {(kind, e, a) for kind in kinds for e in ("eager", "grouped_mm") for a in ("eager", "sdpa")}
        assert {each.name for each in listed} == {"ours", "ours, logits", "transformers"}
        assert all(each.type == listed[0].type for each in listed if each.name != "transformers")


def test_ratios_are_over_the_fastest_mode() -> None:
    samples = {
        Contender("ours", "float32"): sample(0.5, 600),
        Contender("transformers", "float32", "eager", "sdpa"): sample(2.0, 900),
        Contender("transformers", "float32", "grouped_mm", "sdpa"): sample(1.0, 1000),
    }
    ours, slow, fast = training_text("float32", samples).splitlines()[2:]
    assert ours.split()[-7:] == ["4,096", "2.00", "1.00", "2.00", "600", "0.60", "8.0000"]
    assert slow.split()[-6] == "0.50"
    assert fast.split()[-6] == "1.00"
    assert [row["seconds"] for row in training_rows(samples)] == [0.5, 2.0, 1.0]
