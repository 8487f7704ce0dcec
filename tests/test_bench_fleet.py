"""The simulator of fleets: its load, what its routers cost one another, and the table of a server that runs."""

from itertools import pairwise

import pytest

from app.engine.costs import Costs
from bench import fleet, routers
from bench.load import percentile

EIGHT = routers.Fleet(seconds=24)
SWITCHING = routers.Fleet(seconds=16, switch=0.15)
RANDOM, LEAST, OURS = "random (kube-proxy)", "least connections (HAProxy)", "place(): finish + 3 x added work"


def test_a_router_that_knows_the_costs_is_faster_than_one_that_counts_and_that_than_chance():
    slowest = [percentile(fleet.simulate(EIGHT, router, 0.8, 0).took, 99) for router in (OURS, LEAST, RANDOM)]
    assert all(better < 0.95 * worse for better, worse in pairwise(slowest))


def test_where_a_change_of_weights_takes_long_place_makes_few():
    ours, counted = (fleet.simulate(SWITCHING, router, 0.8, 0) for router in (OURS, LEAST))
    assert ours.switches < counted.switches / 4
    assert ours.in_time == 1
    assert percentile(ours.took, 50) < percentile(counted.took, 50) / 2


@pytest.mark.parametrize("router", routers.ROUTERS)
def test_no_router_draws_more_than_the_devices_can_nor_loses_a_request_that_there_is_time_for(router):
    one = routers.Fleet(devices=2, seconds=8, deadline=4)
    light, heavy = (fleet.simulate(one, router, load, 0) for load in (0.2, 3.0))
    assert light.in_time == 1
    # Somewhat more than of the even mix: the shorter requests are those that still have time.
    assert 0.6 < len(heavy.took) / (one.capacity * (one.seconds + one.deadline)) < 1.2
    assert max(heavy.took) <= one.deadline


def test_a_device_alone_takes_what_the_table_says():
    costs = Costs({1: 1.0}, {1: 0.25}, encode=0.125, pixels=routers.SIDE**2)
    seen = fleet.simulate(routers.Fleet(devices=1, costs=costs, deadline=100, seconds=1000), OURS, 0.02, 0)
    assert len(seen.took) > 0
    assert [took % 1 for took in seen.took] == pytest.approx([0.375] * len(seen.took))


def test_a_given_table_is_in_seconds(tmp_path):
    (tmp_path / "costs.json").write_text('{"step": {"1": 0.02, "4": 0.05}, "decode": {"1": 0.01}, "encode": 0}')
    costs = fleet.read_costs(str(tmp_path / "costs.json"))
    assert (costs.step, costs.decode, costs.encode) == ({1: 0.02, 4: 0.05}, {1: 0.01}, 0)


def test_a_running_server_is_simulated_by_its_own_costs(server, capsys):
    server.generate()  # it has encoded a prompt
    server.wait_for_batches()
    metrics = server.metrics()
    costs = fleet.read_costs(server.url)
    assert costs.step[4] == metrics['sdxl_step_cost_seconds{batch="4",device="0"}']
    assert costs.decode[1] == metrics['sdxl_decode_cost_seconds{batch="1",device="0"}']
    assert 0 < costs.encode < 1
    arguments = ["--costs", server.url, "--devices", "2", "--seconds", "1", "--seeds", "1", "--loads", "0.5"]
    fleet.main([*arguments, "--calls", "2", "--routers", RANDOM, OURS])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines if " / " in line and "%" in line] == [RANDOM, OURS]
