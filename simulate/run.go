// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"errors"
	"slices"
	"time"
)

// How a run can end without an answer.
var (
	errClientGone = errors.New("client gone")
	errLoadFailed = errors.New("KV load failed")
	errQueueFull  = errors.New("waiting queue full")
)

// diedError ends the engine process once the client has its answer.
type diedError struct{ reason string }

func (d *diedError) Error() string { return "engine died: " + d.reason }

const (
	finishLength = "length"
	finishStop   = "stop"
	finishError  = "error"

	stateQueued   = "queued"
	stateDeferred = "deferred"
	statePull     = "pull"
	statePrefill  = "prefill"
	stateEncode   = "encode"
	stateDecode   = "decode"
	stateHandover = "handover" // a finished prefill whose request waits to be fetched from
)

// emitter is told each generated token in order; text is what it adds to the answer.
type emitter func(q *sequence, token uint32, text string) error

// newGroup makes the sequences of a request.
func (p *process) newGroup(c *call) *group {
	g := &group{id: c.id, lora: c.lora, arrived: time.Now(), state: stateQueued}
	g.leg = c.leg
	if c.transfer != nil && c.transfer.doRemotePrefill {
		g.remote = c.transfer
		g.remote.push = g.remote.push && p.e.opts.Connector == connectorPush
	}
	salt := uint64(0)
	if c.cacheSalt != "" {
		salt = hashText(c.cacheSalt)
	}
	root := hashText(c.model)
	for i, prompt := range c.prompts {
		var first *sequence
		keys := chain(root, prompt, p.cache.size)
		whole := chainHash(root, prompt)
		for j := range c.n {
			q := &sequence{
				index: i*c.n + j, prompt: len(prompt), salt: salt, root: root, sibling: first,
				tokens: slices.Clip(prompt), chain: slices.Clip(keys),
				id: c.sequenceID(i, j) + "-" + p.e.hex(4), seed: mix(whole ^ c.answerSeed(j)),
			}
			if first == nil {
				first = q
			}
			g.seqs = append(g.seqs, q)
		}
	}
	p.addExtraKeys(c, g)
	g.slots = min(len(g.seqs), p.e.opts.MaxNumSeqs)
	return g
}

// run takes g through queue, pull or prefill, and decode. On success the blocks of a prefill leg are pinned and its
// handle is returned; otherwise everything is freed.
func (p *process) run(ctx context.Context, c *call, g *group, emit emitter) error {
	err := p.serveGroup(ctx, c, g, emit)
	if err == nil {
		return nil
	}
	if g.leg != nil {
		g.leg.left(g)
	}
	p.ended(g, err)
	return err
}

// ended frees a group without an answer and says how it ended.
func (p *process) ended(g *group, err error) {
	p.mu.Lock()
	p.leave(g)
	if errors.Is(err, errLoadFailed) {
		p.meter.finished(g, finishError)
	}
	p.mu.Unlock()
	if errors.Is(err, errClientGone) {
		p.e.letGo(g.remote)
		generated := 0
		for _, q := range g.seqs {
			generated += len(q.generated)
		}
		p.e.records.abort(Abort{At: time.Now(), RequestID: g.id, State: g.state, Tokens: generated})
	}
}

// full reports, and counts, that the queue has no room for g.
func (p *process) full(g *group) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.tooMany(g) {
		return false
	}
	p.meter.add(metricSlots().rejected, 1)
	return true
}

func (p *process) serveGroup(ctx context.Context, c *call, g *group, emit emitter) error {
	if err := p.judge(ctx, g); err != nil {
		return err
	}
	t := &ticket{g: g, blocks: true, slots: g.remote == nil && !defers(g.leg), ready: make(chan struct{})}
	p.mu.Lock()
	ok := p.submit(t, false)
	if !ok {
		p.meter.add(metricSlots().rejected, 1)
	}
	p.mu.Unlock()
	if !ok {
		p.e.letGo(g.remote)
		return errQueueFull
	}
	if !p.admitted(ctx, t) {
		return errClientGone
	}
	queued := time.Since(g.arrived)
	if err := p.load(ctx, g); err != nil {
		return err
	}
	start := time.Now()
	if err := p.encodeMedia(ctx, c, g); err != nil {
		return err
	}
	if !p.e.encodeOnly() && !p.compute(ctx, g) {
		return errClientGone
	}
	p.mu.Lock()
	p.meter.prefilled(g, c, queued, time.Since(start))
	g.state = stateDecode
	p.mu.Unlock()
	return p.decode(ctx, c, g, emit)
}

// judge does what a real engine does with a handle that is not whole.
func (p *process) judge(ctx context.Context, g *group) error {
	if g.remote == nil {
		return nil
	}
	switch g.remote.flaw(p.e.opts.TPSize) {
	case flawDies:
		return &diedError{"AssertionError: remote_block_ids"}
	case flawHangs:
		p.mu.Lock()
		g.state = stateDeferred
		p.active[g] = struct{}{}
		p.deferred += len(g.seqs)
		p.mu.Unlock()
		<-ctx.Done()
		p.mu.Lock()
		p.deferred -= len(g.seqs)
		p.mu.Unlock()
		return &diedError{"KeyError: remote_request_id"}
	case flawIgnored:
		p.e.records.count(func(t *totals) { t.invalidParams++ })
		g.remote = nil
	case flawNone:
	}
	return nil
}

// load fetches g's blocks, if another engine has them, and takes its places in the batch.
func (p *process) load(ctx context.Context, g *group) error {
	if g.remote == nil && g.leg == nil {
		return nil
	}
	if g.remote == nil && !defers(g.leg) {
		died, err := g.leg.load(ctx, g)
		return p.loaded(ctx, died, err)
	}
	p.mu.Lock()
	g.state = statePull
	p.deferred += len(g.seqs)
	p.fetching += len(g.seqs)
	if g.remote != nil {
		p.meter.externalHit(g)
	}
	p.mu.Unlock()
	died, err := p.fetch(ctx, g)
	t := &ticket{g: g, slots: true, ready: make(chan struct{})}
	p.mu.Lock()
	p.deferred -= len(g.seqs)
	p.fetching -= len(g.seqs)
	p.mu.Unlock()
	if err := p.loaded(ctx, died, err); err != nil {
		return err
	}
	p.mu.Lock()
	p.submit(t, true)
	p.mu.Unlock()
	if !p.admitted(ctx, t) {
		return errClientGone
	}
	return nil
}

// fetch gets g's blocks by its wire.
func (p *process) fetch(ctx context.Context, g *group) (died string, err error) {
	if g.fault.diesAt(atPull) {
		p.kill(g.fault)
		return "", errClientGone
	}
	if g.leg != nil {
		return g.leg.load(ctx, g)
	}
	ok, died := p.pull(ctx, g)
	if !ok {
		err = errLoadFailed
	}
	return died, err
}

// loaded is what becomes of a request whose load ended so.
func (p *process) loaded(ctx context.Context, died string, err error) error {
	switch {
	case died != "":
		return &diedError{died}
	case ctx.Err() != nil:
		return errClientGone
	case errors.Is(err, errLoadFailed) && p.e.opts.LoadFailurePolicy == policyRecompute:
		return nil
	}
	return err
}

// compute spends the time of the prefill and fills the blocks; false when the client left meanwhile.
func (p *process) compute(ctx context.Context, g *group) bool {
	p.mu.Lock()
	if g.remote == nil {
		g.state = statePrefill
	}
	stretch := p.stretch()
	p.mu.Unlock()
	uncached, pulled := 0, true
	for _, q := range g.seqs {
		if q.pulled > 0 && q.cached+q.remote >= q.prompt {
			continue
		}
		pulled = false
		if q.sibling == nil {
			uncached += len(q.tokens) - q.cached
		}
		if q.pulled > 0 { // a part of the prompt
			uncached -= q.remote
		}
	}
	d := p.e.timing.prefillFixed + time.Duration(float64(uncached)*float64(p.e.timing.prefillPerToken)*stretch)
	if pulled { // one step for the last token
		d = time.Duration(float64(p.e.timing.interToken) * stretch)
	}
	var sl sleeper
	defer sl.close()
	if p.killComputing(ctx, g, &sl, d) || !sl.sleep(ctx, d) {
		return false
	}
	p.mu.Lock()
	for _, q := range g.seqs {
		q.created += p.computed(q)
	}
	p.flush()
	p.mu.Unlock()
	return true
}
