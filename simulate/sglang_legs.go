// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// stateBootstrap is a prefill that waits for its decode leg to come.
const stateBootstrap = "bootstrap"

// sglangLeg is what both legs have: a room for each sequence.
type sglangLeg struct {
	w       *sglangWire
	numbers []int64
}

// refuseDuplicate is what becomes of a leg whose room is in use.
func (l *sglangLeg) refuseDuplicate(err error) (died string, answer error) {
	if l.w.p.e.opts.DuplicateRoomKills {
		return "AssertionError: " + err.Error(), nil
	}
	dup, _ := errors.AsType[*duplicateError](err)
	return "", transferFailed("KV", dup.room, "room is in use")
}

// sglangPrefill is the prefill leg: it waits for its decode leg, computes, and waits until its KV was taken.
type sglangPrefill struct {
	sglangLeg
	entered []*room
}

func (l *sglangPrefill) phase() string { return phasePrefill }

// defers: the bootstrap queue is outside the batch.
func (l *sglangPrefill) defers() bool { return true }

func (l *sglangPrefill) load(ctx context.Context, g *group) (died string, err error) {
	p := l.w.p
	p.mu.Lock()
	g.state = stateBootstrap
	p.mu.Unlock()
	for _, n := range l.numbers {
		m, err := l.w.rooms.enter(n, true)
		if err != nil {
			return l.refuseDuplicate(err)
		}
		l.entered = append(l.entered, m)
	}
	return "", l.await(ctx, g, "Bootstrapping", func(m *room) <-chan struct{} { return m.joined })
}

// await waits for what event says of every room, as long as the backend does.
func (l *sglangPrefill) await(ctx context.Context, g *group, stage string, event func(*room) <-chan struct{}) error {
	p := l.w.p
	var end <-chan time.Time
	if d := p.e.timing.lease; d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		end = t.C
	}
	for _, m := range l.entered {
		select {
		case <-event(m):
		case <-ctx.Done():
			return errClientGone
		case <-end:
			why := fmt.Sprintf("Request %d timed out after %v in KVPoll.%s", m.number, p.e.timing.lease, stage)
			p.mu.Lock()
			tokens := 0
			for _, q := range g.seqs {
				tokens += len(q.tokens)
			}
			p.e.records.leak(Leak{
				Engine: p.e.opts.Name, RequestID: g.id, RemoteRequestID: m.name(), Blocks: g.blockCount(), Tokens: tokens,
				Since: g.arrived, At: time.Now(), Reason: why,
			})
			p.mu.Unlock()
			return transferFailed("Prefill", m.number, why)
		}
	}
	return nil
}

func (l *sglangPrefill) done(ctx context.Context, g *group) (string, json.RawMessage, error) {
	for i, m := range l.entered {
		l.w.rooms.fill(m, g.seqs[i].blocks)
	}
	err := l.await(ctx, g, "Transferring", func(m *room) <-chan struct{} { return m.taken })
	l.left(g)
	return "", nil, err
}

func (l *sglangPrefill) left(*group) {
	for _, m := range l.entered {
		l.w.rooms.leave(m, true)
	}
}

// sglangDecode is the decode leg: it tells the prefill engines of its rooms that it has blocks, and waits for their KV.
type sglangDecode struct {
	sglangLeg
	hosts   []string
	ports   []int
	entered []entry
}

// entry is a decode leg's place in one room; a process of nil is one that was never reached.
type entry struct {
	*room
	peer   *process
	misses int // heartbeats
}

func (l *sglangDecode) phase() string { return phaseTransfer }

func (l *sglangDecode) load(ctx context.Context, g *group) (died string, err error) {
	for i, n := range l.numbers {
		peer := l.w.p.prefillAt(l.hosts[i], l.ports[i])
		if peer == nil {
			l.entered = append(l.entered, entry{room: &room{number: n}})
			continue
		}
		if err := l.connect(ctx, peer, n); err != nil {
			return "", err
		}
		m, err := sglangOf(peer).rooms.enter(n, false)
		if err != nil {
			return l.refuseDuplicate(err)
		}
		l.entered = append(l.entered, entry{room: m, peer: peer})
	}
	end := time.Now().Add(l.w.p.scaled(sglangWaiting))
	for i := range l.entered {
		if err := l.fetch(ctx, i, g.seqs[i], end); err != nil {
			return "", err
		}
	}
	return "", nil
}

// connect shakes hands at first contact, which fails between engines of different layouts.
func (l *sglangDecode) connect(ctx context.Context, peer *process, number int64) error {
	p := l.w.p
	own, other := &p.e.opts, &peer.e.opts
	if own.BlockSize != other.BlockSize {
		p.pullFailed(strconv.FormatInt(number, 10), "page size mismatch")
		return transferFailed("Decode", number, fmt.Sprintf("Page size mismatch: prefill server has page_size=%d, but decode server has page_size=%d.", other.BlockSize, own.BlockSize))
	}
	if own.KVCacheDtype != other.KVCacheDtype {
		p.pullFailed(strconv.FormatInt(number, 10), "KV cache dtype mismatch")
		return transferFailed("Decode", number, fmt.Sprintf("KV cache dtype mismatch: prefill server has kv_cache_dtype=%s, but decode server has kv_cache_dtype=%s.", other.KVCacheDtype, own.KVCacheDtype))
	}
	wait := p.greet(peer)
	if wait == 0 {
		return nil
	}
	var sl sleeper
	defer sl.close()
	if !sl.sleep(ctx, wait) {
		return errClientGone
	}
	return nil
}

// fetch waits for the KV of one sequence until end, and takes it.
func (l *sglangDecode) fetch(ctx context.Context, i int, q *sequence, end time.Time) error {
	p, en := l.w.p, &l.entered[i]
	beat := time.NewTicker(max(p.scaled(sglangHeartbeat), time.Millisecond))
	defer beat.Stop()
	late := time.NewTimer(time.Until(end))
	defer late.Stop()
	ready := en.ready // nil for ever where no prefill engine was reached
	for {
		select {
		case <-ready:
			ready = nil
			if ok, err := l.take(en, q); ok || err != nil {
				return err
			}
		case <-beat.C:
			if l.lost(en, i) {
				why := fmt.Sprintf("Lost connection with prefill instance (bootstrap_addr: %s:%d)", l.hosts[i], l.ports[i])
				p.pullFailed(en.name(), why)
				return transferFailed("Decode", en.number, why)
			}
		case <-late.C:
			why := fmt.Sprintf("Request %d timed out after %v in KVPoll.WaitingForInput", en.number, p.scaled(sglangWaiting))
			p.pullFailed(en.name(), why)
			return transferFailed("Decode", en.number, why)
		case <-ctx.Done():
			return errClientGone
		}
	}
}

// lost is one heartbeat: any process behind the bootstrap server answers it, also one that knows nothing of the room.
func (l *sglangDecode) lost(en *entry, i int) bool {
	if en.peer == nil || l.w.p.prefillAt(l.hosts[i], l.ports[i]) != nil {
		en.misses = 0
		return false
	}
	en.misses++
	return en.misses >= sglangMisses
}

// take copies the KV of a room that is ready. It returns false when the prefill leg or its engine has gone, which a
// decode engine does not see.
func (l *sglangDecode) take(en *entry, q *sequence) (bool, error) {
	p := l.w.p
	ids, done, ok := sglangOf(en.peer).rooms.take(en.room)
	if !ok {
		return false, nil
	}
	if len(ids) < p.cache.need(q.prompt) {
		done(false)
		p.pullFailed(en.name(), "prompts of different lengths")
		return false, transferFailed("Decode", en.number, "the prefill's prompt is shorter")
	}
	ok, died := p.receive(&group{seqs: []*sequence{q}}, en.peer, ids[:p.cache.need(q.prompt)], Pull{RequestID: en.name(), Verbatim: true})
	done(ok)
	if died != "" {
		return false, transferFailed("Decode", en.number, died)
	}
	return ok, nil
}

func (l *sglangDecode) done(_ context.Context, g *group) (string, json.RawMessage, error) {
	l.left(g)
	return "", nil, nil
}

func (l *sglangDecode) left(*group) {
	for _, en := range l.entered {
		if en.peer != nil {
			sglangOf(en.peer).rooms.leave(en.room, false)
		}
	}
}
