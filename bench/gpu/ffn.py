#!/usr/bin/env python3
"""Prints how the kernels of the FFN side compare with the roof: from RESULTS/SPLIT-T.json of step3-bench and RESULTS/SPLIT.costs.json.

    python3 ffn.py RESULTS

T: rows of all attention ranks together. The floor of a launch is the larger of its bytes at the read bandwidth and its flops at the peak of products
of its type, the best of either that step3-bench measured in these runs.
"""
import glob
import json
import os
import sys


def work(cost, load):
    return cost["base"] + cost["row"] * load["rows"] + cost["expert"] * load["experts"] + cost["pair"] * load["pairs"]


def main(folder):
    splits = sorted(os.path.basename(path).removesuffix(".costs.json") for path in glob.glob(f"{folder}/*.costs.json"))
    for split in splits:
        with open(f"{folder}/{split}.costs.json") as f:
            costs = json.load(f)["ffn"]
        reports = {}
        for path in glob.glob(f"{folder}/{split}-*.json"):
            with open(path) as f:
                report = json.load(f)
            reports[report["rows"] * report["senders"]] = report
        if not reports:
            print(f"{split}: nothing was measured\n")
            continue
        read = max(r["ceilings"]["read"] for r in reports.values())
        peak = {unit: max(r["ceilings"].get(unit, 0) for r in reports.values()) for unit in ("bf16", "fp8", "int8")}
        print(f"{split}: reads {read / 1e9:.0f} GB/s, products fp8 {peak['fp8'] / 1e12:.0f} TFLOP/s; us and % of the floor")
        names = [k["name"] for k in next(iter(reports.values()))["kernels"] if "linear" in costs[k["name"]]["about"]]
        for number, name in enumerate(names):
            print(f"  ({number}) {costs[name]['about']}")
        print(f"{'T':>6}" + "".join(f"{f'({number})':>20}" for number in range(len(names))))
        for tokens, report in sorted(reports.items()):
            line = f"{tokens:>6}"
            for name in names:
                load = next(k for k in report["kernels"] if k["name"] == name)["full"]
                cost, us = costs[name], load["time"]["median"] / 1000
                floor = max(work(cost["bytes"], load) / read, work(cost["flops"], load) / (peak.get(cost["unit"]) or float("inf"))) * 1e6
                line += f"{us:>11.1f} {100 * floor / us:>5.0f} % "
            print(line)
        print()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: ffn.py RESULTS, a folder with SPLIT-T.json and SPLIT.costs.json; run.sh makes it")
    main(sys.argv[1])
