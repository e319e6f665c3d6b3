// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"strings"
	"time"
)

// stretch is how much slower the batch is than one sequence alone.
func (p *process) stretch() float64 {
	return 1 + p.e.timing.stretch*float64(max(p.running-1, 0))/float64(p.e.opts.MaxNumSeqs)
}

// decode generates the answers, a token of each per step.
func (p *process) decode(ctx context.Context, c *call, g *group, emit emitter) error {
	g.first = time.Now()
	var sl sleeper
	defer sl.close()
	next := g.first
	for {
		live, err := p.step(c, g, emit)
		if err != nil {
			return err
		}
		if !live {
			return nil
		}
		p.mu.Lock()
		next = next.Add(time.Duration(float64(p.e.timing.interToken) * p.stretch()))
		p.mu.Unlock()
		if late := time.Since(next); late > time.Second {
			next = next.Add(late) // a stall is not made up for
		}
		if !sl.until(ctx, next) {
			return errClientGone
		}
		for !p.growAll(g) {
			if !p.preempt(ctx, g) {
				return errClientGone
			}
		}
	}
}

// step generates one token of every answer that has no end yet.
func (p *process) step(c *call, g *group, emit emitter) (live bool, err error) {
	made := 0
	for _, q := range g.seqs {
		if q.finish != "" {
			continue
		}
		token := q.next()
		text := c.advance(q, tokenText(token))
		made++
		live = live || q.finish == ""
		if err := emit(q, token, text); err != nil {
			return false, err
		}
	}
	p.mu.Lock()
	p.meter.add(metricSlots().generationTokens, float64(made))
	if len(g.seqs[0].generated) > 1 { // the first token came with the prefill's step
		p.meter.observe(metricSlots().iteration, float64(made), 1)
	}
	p.mu.Unlock()
	return live, nil
}

// advance adds text to q and decides whether the answer ends here. It returns the part of text that belongs to it.
func (c *call) advance(q *sequence, text string) string {
	before := len(q.text)
	q.text = append(q.text, text...)
	made := len(q.generated)
	own := c.limitsOf(q)
	if made >= own.minTokens {
		for _, s := range own.stop {
			window := max(0, before-len(s))
			if i := strings.Index(string(q.text[window:]), s); i >= 0 {
				q.text = q.text[:window+i]
				q.finish, q.stopReason = finishStop, s
				return string(q.text[min(before, len(q.text)):])
			}
		}
		if c.natural && made >= naturalLength(q.seed) {
			q.finish = finishStop
		}
	}
	if made >= c.limit(q) {
		q.finish = finishLength
	}
	return text
}

// naturalLength is after how many tokens an answer without a limit ends by itself: 16 to 127.
func naturalLength(seed uint64) int { return 16 + int(mix(seed)%112) }

// growAll adds the KV of the last token of every living answer; false when a block is missing.
func (p *process) growAll(g *group) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.flush()
	for _, q := range g.seqs {
		if q.finish != "" || len(q.tokens) >= q.prompt+len(q.generated) {
			continue
		}
		if !p.grow(q, q.generated[len(q.tokens)-q.prompt]) {
			return false
		}
	}
	return true
}

// preempt sends g back to the head of the queue, without its blocks, and computes it anew once they are there.
func (p *process) preempt(ctx context.Context, g *group) bool {
	t := &ticket{g: g, blocks: true, slots: true, ready: make(chan struct{})}
	p.mu.Lock()
	p.unplace(g)
	for _, q := range g.seqs {
		p.drop(q)
		q.pulled, q.headroom = 0, 1
	}
	p.meter.add(metricSlots().preemptions, float64(len(g.seqs)))
	p.submit(t, true)
	p.mu.Unlock()
	return p.admitted(ctx, t) && p.compute(ctx, g)
}
