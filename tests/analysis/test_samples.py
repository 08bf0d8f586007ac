from analysis.samples import taking_turns


def test_domains_take_turns_and_keep_their_order() -> None:
    assert taking_turns(["a", "a", "a", "b", "c", "c"]) == [0, 3, 4, 1, 5, 2]
    assert taking_turns([]) == []
