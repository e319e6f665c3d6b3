// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
	"time"
)

// offloading is vLLM's OffloadingConnector with a peer-to-peer tier: a prefill leg parks its blocks under a
// kv_request_id, a decode leg fetches them, and any leg may first pull a prefix that a third engine has cached. Known
// from its source, not from a run.
type offloading struct{ p *process }

// offloadWait is the load deadline of a fetch, before scaling.
const offloadWait = 30 * time.Second

func newOffloading(p *process) wire { return &offloading{p} }

func (*offloading) stop() {}

// remoteBlocks says where blocks are: {kv_request_id, remote_host, remote_port}.
type remoteBlocks struct {
	id, host string
	port     int
}

// readRemote reads one of the objects in kv_transfer_params; nil when it is not there.
func readRemote(params *fields, name string) *remoteBlocks {
	sub := params.object(name)
	if sub == nil {
		return nil
	}
	r := &remoteBlocks{id: sub.text("kv_request_id"), host: sub.text("remote_host")}
	r.port, _ = sub.integer("remote_port")
	params.adopt(sub)
	return r
}

// offloadLeg parks, fetches, or only pulls a cached prefix.
type offloadLeg struct {
	p      *process
	park   *remoteBlocks // of a prefill leg: its id
	fetch  *remoteBlocks // of a decode leg
	source *remoteBlocks // of any leg: whose cache to look into
}

func (o *offloading) read(c *call, _ *fields) (leg, *apiError) {
	params := c.params(memberTransfer)
	if params == nil {
		return nil, nil
	}
	l := &offloadLeg{
		p: o.p, park: readRemote(params, "remote_decoder"), fetch: readRemote(params, "remote_prefiller"),
		source: readRemote(params, "remote_kv_source"),
	}
	c.fields.adopt(params)
	for _, r := range []**remoteBlocks{&l.park, &l.fetch, &l.source} {
		if *r != nil && ((*r).id == "" || (r != &l.park && ((*r).host == "" || (*r).port == 0))) {
			*r = nil
			o.p.e.records.count(func(t *totals) { t.invalidParams++ })
		}
	}
	if l.park == nil && l.fetch == nil && l.source == nil {
		return nil, nil
	}
	return l, nil
}

func (l *offloadLeg) phase() string {
	if l.park != nil {
		return phasePrefill
	}
	return phaseTransfer
}

func (l *offloadLeg) defers() bool { return l.fetch != nil || l.source != nil }

func (l *offloadLeg) load(ctx context.Context, g *group) (died string, err error) {
	switch {
	case l.fetch != nil:
		return l.fetchParked(ctx, g)
	case l.source != nil:
		return "", l.pullCached(ctx, g)
	}
	return "", nil
}

// fetchParked waits for the blocks that a prefill engine parks, the deadline counting from now.
func (l *offloadLeg) fetchParked(ctx context.Context, g *group) (died string, err error) {
	p := l.p
	peer := l.reach(ctx, l.fetch)
	if peer == nil {
		return "", errLoadFailed
	}
	ids, ok := peer.awaitLease(ctx, l.fetch.id, p.scaled(offloadWait))
	switch {
	case ctx.Err() != nil:
		return "", errClientGone
	case !ok:
		p.pullFailed(l.fetch.id, "not parked before the load deadline")
		return "", errLoadFailed
	}
	if ok, died = p.receive(g, peer, ids, Pull{RequestID: l.fetch.id}); !ok {
		return died, errLoadFailed
	}
	peer.free(l.fetch.id)
	return "", nil
}

// reach finds the peer behind a side channel and shakes hands at first contact; nil when there is none, or ctx ended.
func (l *offloadLeg) reach(ctx context.Context, at *remoteBlocks) *process {
	p := l.p
	var sl sleeper
	defer sl.close()
	peer, _ := p.e.registry.dial(p, at.host, at.port)
	wait, why := p.scaled(waitGone), "peer not reached"
	switch {
	case peer != nil && peer.e.opts.HashSeed != p.e.opts.HashSeed:
		why = "handshake: the peer's PYTHONHASHSEED differs"
	case peer != nil:
		wait, why = p.greet(peer), ""
	}
	if !sl.sleep(ctx, wait) {
		return nil
	}
	if why != "" {
		p.pullFailed(at.id, why)
		return nil
	}
	return peer
}

// pullCached copies what the source has cached of the prompt beyond what is cached here. Nothing there is no failure:
// it is computed.
func (l *offloadLeg) pullCached(ctx context.Context, g *group) error {
	p := l.p
	peer := l.reach(ctx, l.source)
	if peer == nil {
		return nil
	}
	var sl sleeper
	defer sl.close()
	rec := Pull{RequestID: l.source.id, From: peer.e.opts.Name, To: p.e.opts.Name}
	for _, q := range g.seqs {
		if q.sibling != nil {
			continue
		}
		found := peer.cachedBlocks(q.keys()[q.cached/p.cache.size:])
		if n := p.storeCached(q, found); n > 0 {
			rec.Blocks += n
			rec.Tokens += n * p.cache.size
		}
	}
	if rec.Blocks == 0 {
		return nil
	}
	took := p.e.timing.transferFixed + time.Duration(rec.Tokens)*p.e.timing.transferPerToken
	if !sl.sleep(ctx, took) {
		return errClientGone
	}
	rec.At, rec.Bytes = time.Now(), rec.Blocks*p.cache.size*bytesPerToken
	p.e.records.pull(rec)
	return nil
}

// cachedBlocks is what the prefix cache has of a prompt's blocks, from the first one on.
func (p *process) cachedBlocks(keys []uint64) (found []uint64) {
	if p.e.running() != p.front {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range keys {
		id, ok := p.cache.index[k]
		if !ok {
			break
		}
		found = append(found, p.cache.blocks[id].content)
	}
	return found
}

// storeCached puts a prefix of full blocks behind the one that q has, short of its last token. It returns how many.
func (p *process) storeCached(q *sequence, contents []uint64) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	first := q.cached / p.cache.size
	n := min(len(contents), (q.prompt-1)/p.cache.size-first)
	for i := range n {
		at := first + i
		if contents[i] != q.chain[at] {
			q.wrong ^= mix(contents[i]) | 1
		}
		p.cache.fill(q.blocks[at], q.key(q.chain[at]), contents[i])
	}
	if n > 0 {
		p.announce(q, first, 0)
		p.flush()
		q.pulled, q.remote = first+n, n*p.cache.size
	}
	return max(n, 0)
}

// done parks the blocks of a prefill. The timer is fixed: it runs on while the decode leg is queued.
func (l *offloadLeg) done(_ context.Context, g *group) (member string, value json.RawMessage, err error) {
	l.parkBlocks(g)
	return "", nil, nil
}

// left parks the blocks too, once they are computed: an abort does not drop them earlier.
func (l *offloadLeg) left(g *group) {
	if g != nil && !g.first.IsZero() {
		l.parkBlocks(g)
	}
}

func (l *offloadLeg) parkBlocks(g *group) {
	if l.park == nil || (l.p.e.opts.CachedNotParked && g.seqs[0].cached > 0) {
		return
	}
	l.p.keepFirst(g, l.park.id, l.p.e.timing.lease)
}
