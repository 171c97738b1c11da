"""What result files say of a run, and what they must not."""

import pytest

from clsgen.run_record import describe_run, without_local_paths, without_secrets


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("--hub_token hf_abcDEF123456", "--hub_token hf_..."),
        ("openai:m@http://alice:s3c@ret@127.0.0.1:9/v1", "openai:m@http://...@127.0.0.1:9/v1"),
        ("https://ghp0123456789abcdef@example.com/x", "https://...@example.com/x"),
        ("git+ssh://git@github.com/a/b", "git+ssh://git@github.com/a/b"),
        ("s3://bucket@v1/notes http://a/x?to=b@c", "s3://bucket@v1/notes http://a/x?to=b@c"),
        ("--hub_token hf_a_mirrors_token", "--hub_token hf_..."),
        ("--output_dir outputs/hf_run", "--output_dir outputs/hf_run"),
    ],
)
def test_tokens_and_passwords_stay_out(said, kept):
    assert without_secrets(said) == kept


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("--data_dir /home/jane/notes --seed 0", "--data_dir .../notes --seed 0"),
        ('"--data_dir=/home/jane/notes/ --seed 0 --out /a/b"', '"--data_dir=.../notes --seed 0 --out .../b"'),
        ("--data_dir '/home/jane/my notes' '--task=/home/jane/a b/'", "--data_dir '.../my notes' '--task=.../a b'"),
        ('{"base_model": "/srv/llama", "n": 1}', '{"base_model": ".../llama", "n": 1}'),
        ("--also_on a=/srv/jane/there --judges lm:/srv/jane/judge", "--also_on a=.../there --judges lm:.../judge"),
        *[(kept, kept) for kept in ("https://a.org/b/c", "s3://in/notes", "a/b/c", "1/2", "g /kWh", "and/or")],
    ],
)
def test_of_a_path_the_last_part_stays(said, kept):
    assert without_local_paths(said) == kept


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        (["--hub_token", "mirror's secret", "--seed", "1"], "--hub_token ... --seed 1"),
        (["--hub-token=mirror's secret", "--hub_model_id", "me/x"], "--hub-token=... --hub_model_id me/x"),
        (["--hub_tok", "s"], "--hub_tok ..."),  # argparse takes the start of a name, too
    ],
)
def test_what_is_given_as_a_token_stays_out_whatever_it_looks_like(argv, kept):
    assert describe_run("train_sft_cls.py", argv)["command"] == f"python train_sft_cls.py {kept}"


def test_a_machine_without_git_has_a_record_without_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_run("train_sft_cls.py", [])["commit"] is None
