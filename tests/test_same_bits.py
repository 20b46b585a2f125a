"""The tool that compares the bits of two builds."""

import json

import same_bits


def test_a_difference_is_found_and_named(tmp_path):
    file, said = tmp_path / "bits.json", []
    assert same_bits.main(["record", str(file), "--cases", "9"], said.append) == 0
    assert same_bits.main(["compare", str(file)], said.append) == 0
    assert said[-1].startswith("9 of 9 cases agree")
    record = json.loads(file.read_text())
    record["digests"][4]["running_var"] = "another"
    file.write_text(json.dumps(record))
    said.clear()
    assert same_bits.main(["compare", str(file)], said.append) == 1
    assert said[0].startswith(f"case 4 differs in running_var: {same_bits.Draw(0, 4).trial()}")
    assert said[1].startswith("8 of 9 cases agree")
    assert same_bits.main(["compare", str(file), "--only", "3"], said.append) == 0
