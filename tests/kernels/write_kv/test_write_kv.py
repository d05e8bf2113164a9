import pytest
import torch

from headrace_kernels.write_kv import WritePlan, rotation_at, write_kv, write_positions

DIM = 16
FREQUENCIES = 10000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)


def turned(heads, positions):
    """Complex multiplication: entry i and i + dim / 2 are one number, turned by position * frequency."""
    numbers = torch.complex(heads[..., : DIM // 2].double(), heads[..., DIM // 2 :].double())
    angles = torch.outer(positions.double(), FREQUENCIES.double()).unsqueeze(1)
    result = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((result.real, result.imag), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (9, 3), (2, 2)])
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_queries_are_turned_and_keys_and_values_land_in_their_slots(tokens, heads, kv_heads, dtype):
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, DIM, generator=generator).to(dtype)
    before = qkv.clone()
    arena = torch.full((6, 3, 2, 8, kv_heads, DIM), torch.nan, dtype=dtype)
    places = torch.randperm(6 * 8, generator=generator)[:tokens]
    positions = torch.randint(0, 3000, (tokens,), generator=generator)
    plan = WritePlan(blocks=places // 8, slots=places % 8)

    q = write_kv(qkv, rotation_at(positions, FREQUENCIES), arena[:, 1], plan)

    atol = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(q.double(), turned(before[:, :heads], positions), atol=atol, rtol=0)
    stored = arena[plan.blocks, 1, :, plan.slots]
    torch.testing.assert_close(
        stored[:, 0].double(), turned(before[:, heads : heads + kv_heads], positions), atol=atol, rtol=0
    )
    assert torch.equal(stored[:, 1], before[:, heads + kv_heads :])
    assert int(arena.isfinite().sum()) == tokens * 2 * kv_heads * DIM


def test_only_the_distance_of_positions_matters_to_a_score():
    vectors = torch.randn(2, 1, DIM)
    scores = []
    for shift in (0, 50):
        rotation = rotation_at(torch.tensor([3, 9]) + shift, FREQUENCIES)
        qkv = vectors.expand(2, 3, DIM).clone()
        arena = torch.zeros(1, 1, 2, 2, 1, DIM)
        plan = WritePlan(blocks=torch.tensor([0, 0]), slots=torch.tensor([0, 1]))
        q = write_kv(qkv, rotation, arena[:, 0], plan)
        scores.append(q[1, 0] @ arena[0, 0, 0, 0, 0])
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


def test_positions_are_noted_in_the_slots_of_the_tokens():
    slot_positions = torch.zeros(2, 4, dtype=torch.int32)
    plan = WritePlan(blocks=torch.tensor([1, 0]), slots=torch.tensor([3, 1]))
    write_positions(slot_positions, torch.tensor([70, 5]), plan)
    assert slot_positions.tolist() == [[0, 5, 0, 0], [0, 0, 0, 70]]


def test_a_projection_without_queries_is_refused():
    rotation = rotation_at(torch.tensor([0]), FREQUENCIES)
    plan = WritePlan(blocks=torch.tensor([0]), slots=torch.tensor([0]))
    with pytest.raises(ValueError, match="leave no query"):
        write_kv(torch.zeros(1, 2, DIM), rotation, torch.zeros(1, 2, 4, 1, DIM), plan)
