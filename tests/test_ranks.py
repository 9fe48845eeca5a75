"""The process group of a criterion: found when it is needed, shared by copies, dropped by pickles."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel

import triton_yolo as ty
from tests.test_losses import small_yolo11, small_yolox

SYSTEMS = pytest.mark.parametrize("make", [small_yolo11, small_yolox])


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@SYSTEMS
def test_all_ranks_are_looked_up_at_use(make, request):
    criterion, *preds, shapes, rows = make(process_group=True)  # before init_process_group
    with pytest.raises(RuntimeError, match=r"process_group is given, but .*init_process_group has not been called"):
        criterion(*preds, shapes, rows)
    request.getfixturevalue("one_rank")
    plain, *_ = make()
    torch.testing.assert_close(criterion(*preds, shapes, rows), plain(*preds, shapes, rows))


@SYSTEMS
def test_copies_share_the_group(make, one_rank):
    criterion, *preds, shapes, rows = make(process_group=one_rank)
    expected = criterion(*preds, shapes, rows).loss
    for twin in (copy.deepcopy(criterion), copy.copy(criterion), AveragedModel(criterion).module):
        assert twin.process_group is one_rank
        assert torch.equal(twin(*preds, shapes, rows).loss, expected)


@SYSTEMS
def test_a_pickle_drops_the_group_and_says_so(make, one_rank):
    criterion, *preds, shapes, rows = make(process_group=one_rank)
    expected = criterion(*preds, shapes, rows).loss
    buffer = io.BytesIO()
    torch.save(torch.nn.ModuleDict({"criterion": criterion}), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)["criterion"]
    for twin in (pickle.loads(pickle.dumps(criterion)), saved, copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        with pytest.raises(RuntimeError, match="process group is not part of a pickle: set process_group"):
            twin(*preds, shapes, rows)
        twin.process_group = True
        assert torch.equal(twin(*preds, shapes, rows).loss, expected)
        twin.process_group = None
        assert torch.equal(twin(*preds, shapes, rows).loss, expected)


@SYSTEMS
@pytest.mark.parametrize("given", [True, None])
def test_what_is_no_group_survives_a_pickle(make, given, one_rank):
    criterion, *preds, shapes, rows = make(process_group=given)
    twin = pickle.loads(pickle.dumps(criterion))
    assert twin.process_group is given
    assert torch.equal(twin(*preds, shapes, rows).loss, criterion(*preds, shapes, rows).loss)


@pytest.mark.parametrize("criterion", [ty.YOLO11Loss, ty.YOLOXLoss])
def test_another_object_is_no_group(criterion):
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup, True or None, got str"):
        criterion(3, process_group="nccl")
