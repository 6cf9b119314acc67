/** Smallest cut between a source and a sink of a small directed graph, by augmenting along shortest paths (Edmonds and Karp 1972). */

export class Network {
  /** edges in pairs, forward and backward: target and capacity left */
  private readonly to: number[] = [];
  private readonly left: number[] = [];
  private readonly edges: number[][] = [];
  readonly source: number = this.node();
  readonly sink: number = this.node();

  node(): number {
    this.edges.push([]);
    return this.edges.length - 1;
  }

  edge(from: number, to: number, capacity: number): void {
    this.edges[from]?.push(this.to.push(to) - 1);
    this.left.push(capacity);
    this.edges[to]?.push(this.to.push(from) - 1);
    this.left.push(0);
  }

  /** Capacity of the smallest cut. It leaves residual capacities behind, from which `sourceSide` and `sinkSide` read the cut. */
  solve(): number {
    for (let flow = 0; ; ) {
      const via = this.search(this.source, (e) => this.left[e] ?? 0, this.sink);
      if (!via.has(this.sink) || flow >= unbounded) return flow;
      const path: number[] = [];
      for (let n = this.sink; n !== this.source; ) {
        const e = via.get(n) as number;
        path.push(e);
        n = this.to[e ^ 1] as number;
      }
      const amount = Math.min(...path.map((e) => this.left[e] as number));
      for (const e of path) {
        this.left[e] = (this.left[e] as number) - amount;
        this.left[e ^ 1] = (this.left[e ^ 1] as number) + amount;
      }
      flow += amount;
    }
  }

  /** Nodes on the source's side of the smallest cut that is nearest to the source. */
  sourceSide(): ReadonlySet<number> {
    return new Set(this.search(this.source, (e) => this.left[e] ?? 0).keys());
  }

  /** Nodes on the sink's side of the smallest cut that is nearest to the sink. */
  sinkSide(): ReadonlySet<number> {
    return new Set(this.search(this.sink, (e) => this.left[e ^ 1] ?? 0).keys());
  }

  /** Breadth first along edges with capacity: the edge by which each node was reached, -1 for the start. */
  private search(start: number, capacity: (edge: number) => number, stop?: number): ReadonlyMap<number, number> {
    const via = new Map([[start, -1]]);
    for (const n of via.keys())
      for (const e of this.edges[n] ?? []) {
        const next = this.to[e] as number;
        if (via.has(next) || capacity(e) <= 0) continue;
        via.set(next, e);
        if (next === stop) return via;
      }
    return via;
  }
}

/** A capacity no cut of finite cost reaches. */
export const unbounded: number = 2 ** 52;
