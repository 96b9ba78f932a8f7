"""Gradient routing in two processes of DistributedDataParallel, against one process's gradients."""

import socket

import torch
from test_router import (
    CASES,
    RULES,
    assert_gradients,
    data,
    double,  # noqa: F401  (used by all)
    expected,
    mlp,
    squares,
    weights_of,
)
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from oversight_rl.agents.routing import Router

IDS = torch.tensor([0, 0, 0, 0, 1, 2, 3, 0])  # one process has a single group, one has four
ONE = torch.tensor([0, 0, 0, 0, 0, 1, 0, 0])  # label 0 leaves the part alone


def in_process(rank, port, state, batch, queue):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    learn(rank, state, batch, queue)
    distributed.barrier()  # who leaves first would break what the other one waits for
    distributed.destroy_process_group()


def learn(rank, state, batch, queue):
    model = mlp()
    model.load_state_dict(state)
    half = slice(4 * rank, 4 * rank + 4)
    batch = tuple(part[half] for part in batch)
    with Router(DistributedDataParallel(model), {"part": CASES["mlp"][1]}, RULES) as router:
        optimizer = router.optimizer(torch.optim.AdamW(model.parameters(), 0.1))
        router.backward(squares, batch, IDS[half])
        queue.put({name: p.grad.numpy().copy() for name, p in model.named_parameters()})
        model.zero_grad()
        with router.labels(IDS[half]):
            squares(router.model, batch).mean().backward()
        queue.put({name: p.grad.numpy().copy() for name, p in model.named_parameters()})
        optimizer.step()  # momentum for all
        for ids, scale in ((ONE, 0), (torch.zeros(8).long(), 1)):  # momentum alone, then less
            optimizer.zero_grad()
            with router.labels(ids[half]):
                (squares(router.model, batch).mean() * scale).backward()
            optimizer.step()
            queue.put({name: p.detach().numpy().copy() for name, p in model.named_parameters()})


def test_two_processes():
    model = mlp()
    _, batch, _ = data(model)
    wanted = expected(model, squares, batch, weights_of(IDS), CASES["mlp"][2])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queues = [context.SimpleQueue() for _ in range(2)]
    given = [(rank, port, model.state_dict(), batch, queues[rank]) for rank in range(2)]
    processes = [context.Process(target=in_process, args=args) for args in given]
    for process in processes:
        process.start()
    results = [[queue.get() for _ in range(4)] for queue in queues]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for *gradients, moved, stayed in results:
        for gradient in gradients:
            for name, parameter in model.named_parameters():
                parameter.grad = torch.from_numpy(gradient[name])
            assert_gradients(model, wanted)
        # a sample of the other process moves the part in both; with none, it stays in both
        assert all((moved[name] == results[0][2][name]).all() for name in moved)
        assert (stayed["2.weight"][3:6] == moved["2.weight"][3:6]).all()
        assert (stayed["2.weight"][:3] != moved["2.weight"][:3]).all()
        for name in stayed:
            assert (stayed[name] == results[0][3][name]).all()
