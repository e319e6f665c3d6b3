// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// A process of several data-parallel ranks is several processes behind the front one's server, which is the first of
// them: each has its own id, blocks, queue, leases and wire.

// addRanks makes the other ranks of a process that is its own front.
func (p *process) addRanks() {
	p.front, p.ranks = p, []*process{p}
	p.wire = newWire(p)
	for r := 1; r < p.e.opts.Ranks; r++ {
		q := &process{e: p.e, id: p.e.uuid(), addr: p.addr, started: p.started, rank: r, front: p, srv: p.srv, cancel: p.cancel}
		q.init(&p.e.opts)
		q.wire = newWire(q)
		p.ranks = append(p.ranks, q)
	}
}

// sidePort is the port of the rank's KV side channel: the engine's plus the rank.
func (p *process) sidePort() int { return p.e.sidePort + p.rank }

// rankOf parses the rank header; ok is false where there is none. What is not a number is ignored.
func rankOf(h http.Header) (rank int, ok bool) {
	n, err := strconv.Atoi(strings.TrimSpace(h.Get(headerRank)))
	return n, err == nil
}

// checkRank refuses a data-parallel rank that this engine does not have.
func (e *Engine) checkRank(h http.Header) *apiError {
	if n, ok := rankOf(h); ok && (n < 0 || n >= e.opts.Ranks) {
		return badRequest("", "data_parallel_rank %d is out of range [0, %d).", n, e.opts.Ranks)
	}
	return nil
}

// rankFor is the rank that a request runs on: the one its header names, else the least loaded, in turn where several
// are. A rank that is not there is refused later, in its turn among the checks.
func (p *process) rankFor(h http.Header) *process {
	if len(p.ranks) == 1 {
		return p
	}
	if n, ok := rankOf(h); ok {
		return p.ranks[min(max(n, 0), len(p.ranks)-1)]
	}
	start := int(p.turn.Add(1)-1) % len(p.ranks)
	best, least := p, -1
	for i := range p.ranks {
		q := p.ranks[(start+i)%len(p.ranks)]
		if load := q.load4(); least < 0 || load < least {
			best, least = q, load
		}
	}
	return best
}

// load4 is the rank's load as vLLM's own balancer weighs it: a waiting request counts as four running ones.
func (p *process) load4() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	capacity, adapter := p.waiting()
	return 4*(capacity+adapter+p.deferred) + p.running
}

// hasRank reports whether id is one of the ranks of p's process.
func (p *process) hasRank(id string) bool {
	return slices.ContainsFunc(p.front.ranks, func(q *process) bool { return q.id == id })
}

// RankIDs are the engine ids of the present process's ranks; none when the engine is down.
func (e *Engine) RankIDs() []string {
	p := e.running()
	if p == nil {
		return nil
	}
	ids := make([]string, 0, len(p.ranks))
	for _, q := range p.ranks {
		ids = append(ids, q.id)
	}
	return ids
}

// ranksPage appends the page of several ranks: each family with the samples of one after the other.
func (p *process) ranksPage(dst []byte, names []string, f Faults) []byte {
	o := &p.e.opts
	pages, meters := make([]*page, len(p.ranks)), make([]*meter, len(p.ranks))
	for r, q := range p.ranks {
		k := o.pageKey()
		k.rank = r
		pages[r] = p.e.registry.page(k)
		q.mu.Lock()
		q.gauges(f)
		meters[r] = q.meter.clone()
		q.mu.Unlock()
		if f.Metrics == metricsFrozen {
			meters[r] = p.e.faults.freeze(r, meters[r])
		}
	}
	for i := range pages[0].families {
		if f.Metrics == metricsMissing && isGauge(pages[0].families[i].name) {
			continue
		}
		for r, pg := range pages {
			fam := pg.families[i]
			if r > 0 {
				if fam.dynamic || len(fam.samples) == 0 || !strings.Contains(fam.samples[0].prefix, `engine="`) {
					break // the server's, not an engine's
				}
				fam.head = ""
			}
			dst = meters[r].family(dst, &fam, names, o.MaxLoRAs)
		}
	}
	return dst
}
