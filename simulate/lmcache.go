// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"time"
)

// lmcachePD is LMCache's disaggregated prefill: a prefill leg is told a decode engine and writes the prompt's blocks
// into its receiver buffer; the decode engine finds them there by content. Known from LMCache's source, not from a run.
type lmcachePD struct{ p *process }

// LMCache's ports of its examples; engines of one registry count from them, a rank each.
const (
	firstInitPort  = 7300
	firstAllocPort = 17400
)

// Labels of an endpoints file.
const (
	labelInitPort = "baton-epp/lmcache-init-port"
	labelDataPort = "baton-epp/lmcache-data-port"
)

func newLMCachePD(p *process) wire { return &lmcachePD{p} }

func (*lmcachePD) stop() {}

// receiverPorts are where p's receiver is introduced and where it hands out memory.
func (p *process) receiverPorts() (initPort, allocPort int) {
	n := p.sidePort() - firstSidePort
	return firstInitPort + n, firstAllocPort + n
}

func lmcacheLabels(e *Engine) map[string]string {
	n := e.sidePort - firstSidePort
	return map[string]string{labelInitPort: strconv.Itoa(firstInitPort + n), labelDataPort: strconv.Itoa(firstAllocPort + n)}
}

// receiver is disagg_spec: whom a prefill leg writes to.
type receiver struct {
	id, host            string
	initPort, allocPort int
}

// lmcacheLeg is a prefill leg, with a receiver or without a usable one, or any other request.
type lmcacheLeg struct {
	p        *process
	prefill  bool
	to       receiver
	firstTok bool
}

func (l *lmcachePD) read(c *call, f *fields) (leg, *apiError) {
	one := &lmcacheLeg{p: l.p}
	params := c.params(memberTransfer)
	if params == nil {
		return one, nil
	}
	one.firstTok = params.boolean("ret_first_tok")
	spec := params.object("disagg_spec")
	if spec != nil {
		one.prefill = true
		one.to = receiver{
			id: spec.text("req_id"), host: spec.text("receiver_host"),
			initPort: firstPort(spec, "receiver_init_port"), allocPort: firstPort(spec, "receiver_alloc_port"),
		}
		params.adopt(spec)
	}
	one.prefill = one.prefill || one.firstTok
	f.adopt(params)
	return one, nil
}

// firstPort reads a port, or the first of the ports of tensor-parallel ranks.
func firstPort(f *fields, name string) int {
	var list []int
	if v, ok := f.raw(name); ok && json.Unmarshal(v, &list) == nil {
		if len(list) == 0 {
			return 0
		}
		return list[0]
	}
	n, _ := f.integer(name)
	return n
}

func (l *lmcacheLeg) phase() string {
	if l.prefill {
		return phasePrefill
	}
	return phasePlain
}

func (l *lmcacheLeg) defers() bool { return false }

// load takes what was written for the prompt out of the receiver buffer.
func (l *lmcacheLeg) load(ctx context.Context, g *group) (died string, err error) {
	if l.prefill {
		return "", nil
	}
	return "", l.p.loadFound(ctx, g, l.p.takeBuffered, Pull{From: "buffer"}, 0)
}

// done writes the blocks, if the receiver can be reached, and answers the first token.
func (l *lmcacheLeg) done(ctx context.Context, g *group) (member string, value json.RawMessage, err error) {
	if !l.prefill {
		return "", nil, nil
	}
	q := g.seqs[0]
	err = l.push(ctx, g, q)
	if err != nil && (!errors.Is(err, errLoadFailed) || l.p.e.opts.LoadFailurePolicy == policyFail) {
		return "", nil, err
	}
	if !l.firstTok || len(q.generated) == 0 {
		return "", nil, nil
	}
	return memberTransfer, json.RawMessage(`{"first_tok":` + strconv.Itoa(int(q.generated[0])) + `}`), nil
}

func (l *lmcacheLeg) left(*group) {}

func (l *lmcacheLeg) push(ctx context.Context, g *group, q *sequence) error {
	p := l.p
	peer := p.e.registry.receiver(p, l.to)
	var sl sleeper
	defer sl.close()
	if peer == nil || l.to.id == "" {
		if err := sl.orGone(ctx, p.scaled(waitGone)); err != nil {
			return err
		}
		p.pullFailed(l.to.id, "receiver not reached")
		return errLoadFailed
	}
	keys, contents := p.fullBlocks(q)
	wait := p.greet(peer) + p.transferTime(len(keys)*p.cache.size)
	if err := sl.orGone(ctx, wait); err != nil {
		return err
	}
	if !peer.alive() {
		p.pullFailed(l.to.id, "receiver gone")
		return errLoadFailed
	}
	peer.buffer(g.id, l.to.id, keys, contents)
	peer.e.records.pull(Pull{
		At: time.Now(), From: p.e.opts.Name, To: peer.e.opts.Name, RequestID: l.to.id, Tokens: len(keys) * p.cache.size, Blocks: len(keys),
		Bytes: len(keys) * p.cache.size * bytesPerToken, Wrong: q.wrong != 0,
	})
	return nil
}

// receiver finds the process whose receiver is meant; nil when there is none.
func (r *Registry) receiver(from *process, to receiver) *process {
	ip, err := netip.ParseAddr(to.host)
	if to.host == "localhost" {
		ip, err = from.addr.Addr(), nil
	}
	if err != nil {
		return nil
	}
	for _, e := range r.all() {
		front := e.running()
		if front == nil || e.Addr().Addr() != ip {
			continue
		}
		for _, p := range front.ranks {
			_, ok := p.wire.(*lmcachePD)
			if a, b := p.receiverPorts(); ok && a == to.initPort && b == to.allocPort {
				return p
			}
		}
	}
	return nil
}

// written is what another engine wrote into this one's receiver buffer.
type written struct{ keys, contents []uint64 }

// buffer keeps what another engine wrote until it is used or LMCache's timer ends.
func (p *process) buffer(request, id string, keys, contents []uint64) {
	if len(keys) == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	l := &lease{id: id, request: request, why: "receiver buffer not used in time", buffered: &written{keys, contents}}
	p.keepLocked(&sequence{tokens: make([]uint32, len(keys)*p.cache.size)}, l, max(p.e.timing.lease, 1))
}

// takeBuffered takes the longest prefix of keys that was written here out of the buffer.
func (p *process) takeBuffered(keys []uint64) (contents []uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var best *lease
	for _, l := range p.leases {
		if l.buffered == nil || len(keys) == 0 {
			continue
		}
		from := slices.Index(l.buffered.keys, keys[0])
		if from < 0 {
			continue
		}
		n := 0
		for n < len(keys) && from+n < len(l.buffered.keys) && l.buffered.keys[from+n] == keys[n] {
			n++
		}
		if n > len(contents) {
			best, contents = l, l.buffered.contents[from:from+n]
		}
	}
	if best != nil {
		p.freeLocked(best)
	}
	return contents
}
