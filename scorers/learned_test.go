// SPDX-License-Identifier: Apache-2.0

package scorers_test

import (
	"slices"
	"testing"
	"time"

	"github.com/baton-epp/baton/internal/alloctest"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

func TestWarmPair(t *testing.T) {
	s := scorer(t, "warm-pair-scorer", "")
	peer := pooltest.E("peer").Build(7)
	cands := rows(e(), e(), e())
	peer.Warm.Add(cands[1].Endpoint.Slot) // as a decode endpoint, from the second
	cands[2].Endpoint.Warm.Add(peer.Slot) // the third, decoding, from it
	f := func(name string, phase scheduler.Phase, peer *pool.Endpoint, want ...float64) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			t.Helper()
			cy := cycle()
			cy.Phase, cy.Peer = phase, peer
			check(t, s, cy, cands, want...)
		})
	}
	f("prefill, for the endpoint that decodes", scheduler.PhasePrefill, peer, 0, 1, 0)
	f("decode, for the endpoint that prefills", scheduler.PhaseDecode, peer, 0, 0, 1)
	f("the phase that is picked first", scheduler.PhaseDecode, nil, .5, .5, .5)
	f("prefill-first", scheduler.PhasePrefill, nil, .5, .5, .5)
	f("encode", scheduler.PhaseEncode, peer, .5, .5, .5)
	cands[2].Endpoint.Warm.Forget(peer.Slot)
	f("a failed transfer", scheduler.PhaseDecode, peer, 0, 0, 0)
}

func TestWarmPairAllocations(t *testing.T) {
	s := scorer(t, "warm-pair-scorer", "")
	cy := cycle()
	cy.Peer = pooltest.E("peer").Build(7)
	cands := rows(e(), e(), e())
	out := make([]float64, len(cands))
	for _, cy.Phase = range []scheduler.Phase{scheduler.PhasePrefill, scheduler.PhaseDecode} {
		alloctest.AtMost(t, 0, "a peer's pairs", func() { s.Score(cy, cands, out) })
	}
}

func TestPrefillTime(t *testing.T) {
	f := func(name string, change func(c []scheduler.Candidate), seconds ...float64) {
		t.Helper()
		var want []float64
		for _, t := range seconds {
			want = append(want, (slices.Min(seconds)+.01)/(t+.01))
		}
		t.Run(name, func(t *testing.T) {
			t.Helper()
			cy := cycle()
			cy.Prompts[0] = scheduler.Prompt{Blocks: 100, BlockSize: 64, Tokens: 6400}
			cands := rows(e(), e(), e())
			change(cands)
			check(t, scorer(t, "prefill-time-scorer", ""), cy, cands, want...)
		})
	}
	speed := func(c *scheduler.Candidate, tokens int64) { c.Endpoint.Pace.Prefilled(tokens, time.Second) }
	f("nothing learned, nothing in flight", func([]scheduler.Candidate) {}, 1, 1, 1)
	f("nothing learned: tokens decide", func(c []scheduler.Candidate) { c[1].Tokens, c[2].Tokens = 6400, 12800 }, 6400, 12800, 19200)
	f("speeds", func(c []scheduler.Candidate) { speed(&c[0], 6400); speed(&c[1], 3200); speed(&c[2], 1600) }, 1, 2, 4)
	f("an unknown speed is the mean of the others", func(c []scheduler.Candidate) {
		speed(&c[0], 12800)
		speed(&c[1], 6400) // the unknown one is at 9,600
	}, .5, 1, 2./3)
	f("one known: all as fast as it", func(c []scheduler.Candidate) { speed(&c[0], 6400); c[1].Tokens = 6400 }, 1, 2, 1)
	f("tokens in flight", func(c []scheduler.Candidate) {
		for i := range c {
			speed(&c[i], 6400)
		}
		c[0].Tokens, c[1].Tokens = 3200, 12800
	}, 1.5, 3, 1)
	f("cached tokens", func(c []scheduler.Candidate) {
		for i := range c {
			speed(&c[i], 6400)
		}
		c[0].Matched[0], c[1].Matched[0] = 25, 100
	}, .75, 0, 1)
	f("speeds that differ by what noise does", func(c []scheduler.Candidate) {
		speed(&c[0], 6400)
		speed(&c[1], 6464)
		speed(&c[2], 6400)
	}, 1, 6400.0/6464, 1)
}

// TestPrefillTimeSeesTheWait: and believes it less, the longer nobody has seen it.
func TestPrefillTimeSeesTheWait(t *testing.T) {
	s := scorer(t, "prefill-time-scorer", "")
	cands := rows(e(), e())
	for i := range cands {
		cands[i].Endpoint.Pace.Prefilled(6400, time.Second)
	}
	for range 200 {
		cands[0].Endpoint.Pace.Prefilled(0, 4*time.Second)
	}
	cands[1].Tokens = 6400 // a second of work
	cy := cycle()
	cy.Prompts[0] = scheduler.Prompt{Blocks: 100, BlockSize: 64, Tokens: 6400}
	out := make([]float64, 2)
	s.Score(cy, cands, out)
	if out[0] > .6 || out[1] != 1 {
		t.Errorf("%v: want the one that nobody waits for", out)
	}
	cy.Now = cy.Now.Add(time.Minute)
	s.Score(cy, cands, out)
	if out[0] != 1 || out[1] > .6 {
		t.Errorf("%v: want the one that nobody has waited for of late", out)
	}
}
