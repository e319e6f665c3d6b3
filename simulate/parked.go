// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"slices"
	"time"
)

// keep takes the blocks of q over into l, which is filled but for them and its times, for d; 0 is without end. A lease
// of the same id that is still there is dropped and counts as a leak: nobody can name its blocks any more.
func (p *process) keep(q *sequence, l *lease, d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.keepLocked(q, l, d)
}

func (p *process) keepLocked(q *sequence, l *lease, d time.Duration) {
	if old := p.leases[l.id]; old != nil {
		p.leakLocked(old, "replaced by another request of the same id")
	}
	l.tokens, l.since = len(q.tokens), time.Now()
	if p.events != nil && p.e.opts.Connector == connectorOffload {
		l.parked = p.events.park(q)
	}
	l.blocks, q.blocks = q.blocks, nil
	p.leases[l.id] = l
	if d > 0 {
		l.expires = l.since.Add(d)
		l.timer = time.AfterFunc(d, func() { p.expire(l) })
	}
	for _, ch := range p.awaited[l.id] {
		close(ch)
	}
	delete(p.awaited, l.id)
}

// keepFirst keeps the blocks of g's first answer under id for d, and those of the others under ids that nobody knows:
// their leases can only expire.
func (p *process) keepFirst(g *group, id string, d time.Duration) {
	for i, q := range g.seqs {
		l := &lease{id: id, request: g.id}
		if i > 0 {
			l.id, l.noRaw = q.id, "another answer's blocks have the request's id"
		}
		p.keep(q, l, d)
	}
}

// awaitLease waits at most d for the lease id to be kept here and returns its blocks, for [process.receive]; ok is false
// when it was not, ctx ended, or the process did.
func (p *process) awaitLease(ctx context.Context, id string, d time.Duration) (ids []int64, ok bool) {
	p.mu.Lock()
	if ids, ok = p.blocksLocked(id); ok {
		p.mu.Unlock()
		return ids, true
	}
	ch := make(chan struct{})
	if p.awaited == nil {
		p.awaited = map[string][]chan struct{}{}
	}
	p.awaited[id] = append(p.awaited[id], ch)
	p.mu.Unlock()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ch:
		return p.blocksOf(id)
	case <-timer.C:
	case <-ctx.Done():
	case <-p.front.gone:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if rest := slices.DeleteFunc(p.awaited[id], func(c chan struct{}) bool { return c == ch }); len(rest) > 0 {
		p.awaited[id] = rest
	} else {
		delete(p.awaited, id)
	}
	return nil, false
}

// blocksOf are the blocks under the lease id; ok is false when there is no such lease.
func (p *process) blocksOf(id string) (ids []int64, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.blocksLocked(id)
}

func (p *process) blocksLocked(id string) (ids []int64, ok bool) {
	l := p.leases[id]
	if l == nil {
		return nil, false
	}
	ids = make([]int64, 0, len(l.blocks))
	for _, b := range l.blocks {
		ids = append(ids, int64(b))
	}
	return ids, true
}

// free gives back the blocks under the lease id; false when there is none.
func (p *process) free(id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.leases[id]
	if l != nil {
		p.freeLocked(l)
	}
	return l != nil
}

// JumpClock moves the clock of the lease timers by d, real time before scaling: leases end that much earlier, or later
// when d is negative.
func (e *Engine) JumpClock(d time.Duration) {
	p := e.running()
	if p == nil {
		return
	}
	d = p.scaled(d)
	for _, q := range p.ranks {
		q.mu.Lock()
		for _, l := range q.leases {
			if l.timer != nil {
				l.expires = l.expires.Add(-d)
				l.timer.Reset(max(time.Until(l.expires), 0))
			}
		}
		q.mu.Unlock()
	}
}
