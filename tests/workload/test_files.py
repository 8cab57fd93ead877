import gzip
import json
from pathlib import Path

import pytest

from baton.workload import SessionWorkload, WorkloadError, read_trace, write_trace
from baton.workload.files import read_output_classes

TRACES = Path(__file__).parents[2].parent / "shared" / "traces"

MOONCAKE = {"timestamp": 3000, "input_length": 1030, "output_length": 50, "hash_ids": [0, 1, 2]}
CONVERSATION = {
    "conversation": "a", "turn": 1, "timestamp": 9000, "input_length": 130, "output_length": 9,
    "api_time": 3.4, "think_time": 2.5, "shared_prefix_tokens": 100, "hash_ids": [4, 5],
}  # fmt: skip
PLAIN = {"arrival_s": 0.5, "num_prompt_tokens": 9, "num_output_tokens": 3}


def file_of(folder: Path, *lines: object, name: str = "trace.jsonl") -> Path:
    path = folder / name
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_mooncake(tmp_path: Path):
    trace = read_trace(file_of(tmp_path, MOONCAKE, name="talk.jsonl.gz"))
    assert (trace.name, trace.block_size_tokens) == ("talk", 512)
    (request,) = trace
    assert (request.arrival_s, request.num_prompt_tokens, request.num_output_tokens) == (3.0, 1030, 50)
    assert request.block_hashes.tolist() == [0, 1, 2]
    assert trace.num_full_blocks(0) == 2  # 1030 = 2 * 512 + 6


def test_conversations_have_sessions_and_think_times(tmp_path: Path):
    other = CONVERSATION | {"conversation": "b", "turn": 0, "timestamp": 0, "think_time": 0}
    trace = read_trace(file_of(tmp_path, CONVERSATION, other))
    assert trace.block_size_tokens == 64
    assert [(r.arrival_s, r.session_id, r.turn, r.think_s) for r in trace] == [
        (0.0, 1, 0, 0.0),
        (9.0, 0, 1, 2.5),
    ]


def test_bailian_chats_are_chained_by_their_parents(tmp_path: Path):
    line = {"timestamp": 61.1, "input_length": 20, "output_length": 3, "type": "text", "hash_ids": [1, 2]}
    chats = [(5, -1, 1), (9, 5, 2), (12, 9, 3), (13, -1, 1)]
    lines = [line | {"chat_id": chat, "parent_chat_id": parent, "turn": turn} for chat, parent, turn in chats]
    trace = read_trace(file_of(tmp_path, *lines))
    assert trace.session_ids.tolist() == [5, 5, 5, 13]
    assert (trace.block_size_tokens, trace[0].arrival_s) == (16, 61.1)


def test_plain_lines(tmp_path: Path):
    hashed = PLAIN | {"block_hashes": [7, 8], "session_id": "x", "turn": 2, "think_s": 1.5}
    trace = read_trace(file_of(tmp_path, {"block_size_tokens": 4}, hashed))
    assert trace[0][1:4] == (0.5, 9, 3)
    assert trace[0].block_hashes.tolist() == [7, 8]
    assert trace[0][5:] == (0, 2, 1.5)
    bare = read_trace(file_of(tmp_path, PLAIN))
    assert (bare.block_size_tokens, bare[0].session_id) == (0, -1)


def test_csv_files(tmp_path: Path):
    azure = read_trace(
        file_of(
            tmp_path,
            "TIMESTAMP,ContextTokens,GeneratedTokens",
            "2023-11-16 18:17:03.9799600,4808,10",
            "2023-11-16 18:17:04.0319600,3180,8",
            name="azure.csv",
        )
    )
    assert azure.arrival_s.tolist() == [0.0, pytest.approx(0.052, abs=1e-6)]
    assert azure.num_prompt_tokens.tolist() == [4808, 3180]
    lengths = read_trace(file_of(tmp_path, "input_length,output_length", "74,918", "290,905", name="l.csv"))
    assert not lengths.has_arrivals and lengths.num_output_tokens.tolist() == [918, 905]
    plain = read_trace(
        file_of(tmp_path, "arrival_s,num_prompt_tokens,num_output_tokens", "1.5,20,3", name="p.csv")
    )
    assert plain.has_arrivals and plain.arrival_s.tolist() == [1.5]


def test_a_written_trace_is_read_back(tmp_path: Path):
    trace = SessionWorkload(num_sessions=20, session_rate_per_s=1.0).generate(seed=1)
    path = tmp_path / "made.jsonl.gz"
    write_trace(trace, path)
    again = read_trace(path)
    assert len(again) == len(trace) and again.block_size_tokens == trace.block_size_tokens
    for one, other in zip(trace, again, strict=True):
        assert one.block_hashes.tolist() == other.block_hashes.tolist()
        assert (one[:4], one[6:]) == (other[:4], other[6:])
    assert again.previous_turn.tolist() == trace.previous_turn.tolist()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([MOONCAKE, "{"], "line 2: '{' is not JSON"),
        ([MOONCAKE, "[1]"], r"line 2: '\[1\]', expected a JSON object"),
        ([MOONCAKE, {"timestamp": 1}], "line 2: input_length is missing, found timestamp"),
        (
            [MOONCAKE | {"output_length": -1}],
            "line 1: output_length is -1, expected a whole number of at least 1",
        ),
        ([MOONCAKE | {"input_length": 9.5}], "line 1: input_length is 9.5, expected a whole number"),
        (
            [MOONCAKE | {"timestamp": float("nan")}],
            "line 1: timestamp is nan, expected a number of at least 0",
        ),
        ([MOONCAKE | {"hash_ids": "0 1"}], "line 1: hash_ids is '0 1', expected a list"),
        (
            [MOONCAKE | {"hash_ids": [1, 2, 3, 4]}],
            "4 hash_ids of 512 tokens for a prompt of 1030, expected at most 3",
        ),
        ([MOONCAKE | {"hash_ids": [2**70]}], "hash_ids has a number beyond 64 bits"),
        ([PLAIN | {"block_hashes": [1]}], "block_hashes without a block size"),
        ([{"a": 1, "b": 2}], "line 1: fields a, b belong to no known trace"),
        ([{"block_size_tokens": 4}], "has no requests"),
        ([""], "is empty"),
        (["arrival_s,prompt", "1,2"], "line 1: columns arrival_s, prompt belong to no known trace"),
        (["input_length,output_length"], "a header and no rows"),
        (
            ["input_length,output_length", "5,6", "5"],
            "line 3: not as many values as the header has columns, 2",
        ),
        (["input_length,output_length", "5,6,7"], "line 2: not as many values as the header has columns, 2"),
        (["input_length,output_length", "5,x"], "line 2: output_length is 'x', expected a whole number"),
        (["input_length,output_length", "0,5"], "line 2: input_length is 0, expected at least 1"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "noon,1,1"], "line 2: TIMESTAMP is 'noon'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_file_is_refused_with_file_line_and_expectation(tmp_path: Path, lines: list, says: str):
    path = file_of(tmp_path, *lines)
    with pytest.raises(WorkloadError, match=says) as caught:
        read_trace(path)
    assert str(caught.value).startswith(str(path))


def test_unreadable_files_are_refused(tmp_path: Path):
    with pytest.raises(WorkloadError, match="cannot be read: .*No such file"):
        read_trace(tmp_path / "absent.jsonl")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress((json.dumps(PLAIN) + "\n").encode() * 1000)[:-20])
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_trace(cut)
    with pytest.raises(WorkloadError, match="block_size_tokens is 0"):
        read_trace(file_of(tmp_path, MOONCAKE), block_size_tokens=0)


@pytest.mark.skipif(not TRACES.is_dir(), reason="needs the public traces in ../shared/traces")
@pytest.mark.parametrize(
    ("name", "requests", "rate_per_s", "gap_cv", "mean_prompt", "ideal_hits"),
    # Requests, rate, CV, mean prompt length and ideal reuse as the files' README states them.
    [
        ("mooncake_conversation.jsonl.gz", 5719, 3.18, 2.92, 12870, 0.347),
        ("mooncake_synthetic.jsonl.gz", 2687, 3.84, 1.01, 13329, 0.454),
        ("AzureLLMInferenceTrace_code.csv.gz", 5353, 3.14, 13.64, 2028, 0.0),
        ("AzureLLMInferenceTrace_conv.csv.gz", 9736, 5.56, 1.07, 1237, 0.0),
        ("reasoning_r1_generated_b.csv.gz", 14475, 4.02, 1.66, 1080, 0.0),
    ],
)
def test_public_traces_have_the_statistics_their_readme_states(
    name: str, requests: int, rate_per_s: float, gap_cv: float, mean_prompt: float, ideal_hits: float
):
    trace = read_trace(TRACES / name)
    assert len(trace) == requests
    assert trace.rate_per_s == pytest.approx(rate_per_s, abs=0.006)
    assert trace.gap_cv == pytest.approx(gap_cv, abs=0.006)
    assert trace.num_prompt_tokens.mean() == pytest.approx(mean_prompt, abs=0.6)
    assert trace.ideal_hit_share() == pytest.approx(ideal_hits, abs=0.002)


@pytest.mark.skipif(not TRACES.is_dir(), reason="needs the public traces in ../shared/traces")
def test_predicted_classes_tell_something_of_the_length():
    classes = read_output_classes(TRACES / "predicted_output_classes.csv.gz")
    lengths, guess = classes.num_output_tokens, classes.predicted["predicted_class_3"]
    assert [round(lengths[guess == number].mean()) for number in range(3)] == [79, 270, 355]
