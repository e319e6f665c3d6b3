// SPDX-License-Identifier: Apache-2.0

package schedulertest

import (
	"encoding/base64"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/scheduler"
)

// world is one kind of pool: how its endpoint i looks.
type world struct {
	name   string
	build  func(i int) *pooltest.Builder
	taught bool // speeds are learned, and some pairs are warm
}

func worlds() []world {
	roles := []string{"", "decode", "prefill", "encode", "both", "nonsense"}
	mixed := func(i int) *pooltest.Builder {
		b := pooltest.E(fmt.Sprintf("p%d", i)).Waiting(float64(i%7)).Running(float64(i%5)).KV(float64(i%11)/10).
			LoRA(i%3, "foo", "bar").WaitingLoRA("m").InFlight(int64(i%13) * 1000)
		if role := roles[i%len(roles)]; role != "" {
			b.Role(role)
		}
		return b.Label("a", strconv.Itoa(i%2))
	}
	return []world{
		{name: "mixed", build: mixed},
		{name: "taught", build: mixed, taught: true},
		{name: "all equal", build: func(i int) *pooltest.Builder { return pooltest.E(fmt.Sprintf("p%d", i)) }},
		{name: "stale", build: func(i int) *pooltest.Builder { return mixed(i).Stale() }},
		{name: "never scraped", build: func(i int) *pooltest.Builder { return mixed(i).Unscraped() }},
		{name: "half of it stale", build: func(i int) *pooltest.Builder {
			if i%2 == 0 {
				return mixed(i).Stale()
			}
			return mixed(i)
		}},
		{name: "nonsense", build: func(i int) *pooltest.Builder {
			odd := []float64{math.NaN(), math.Inf(1), math.Inf(-1), -5, 1e308}[i%5]
			return mixed(i).Waiting(odd).Running(odd).KV(odd)
		}},
	}
}

// candidates builds n rows of the world.
func (w world) candidates(n int) []scheduler.Candidate {
	cands := make([]scheduler.Candidate, n)
	for i := range cands {
		e := w.build(i).Build(uint32(i))
		if w.taught {
			e.Pace.Prefilled(int64(1000+i), time.Duration(1+i%23)*100*time.Millisecond)
			e.Pace.Received(int64(1000+i), time.Duration(1+i%7)*10*time.Millisecond)
			e.Warm.Add(uint32(i / 2))
		}
		m := e.Metrics()
		c := scheduler.Candidate{
			Endpoint: e, Metrics: m, Fresh: m.Fresh(now()),
			Requests: e.Load.Requests(), Tokens: e.Load.Tokens(), SinceScrape: e.Load.SinceScrape(m),
		}
		c.Matched[0] = int32(i % 17)
		c.Score = float64(i % 4) // equal ones, and zeros
		cands[i] = c
	}
	return cands
}

func now() time.Time { return time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC) }

// cycle is the cycle in which every plugin runs.
func cycle() *scheduler.Cycle {
	text := "what is the meaning of life?"
	r := &inference.Request{
		API: inference.Completions, Model: "m", HasModel: true, N: 1, Prompts: 1, ID: "id", MaxTokens: 10,
		Headers: inference.Headers{
			{Name: "x-session-id", Value: "s"},
			{Name: "x-session-token", Value: base64.StdEncoding.EncodeToString([]byte("default/p1"))},
		},
		Text: []inference.Span{{Start: 0, End: len(text)}}, TextBytes: len(text),
	}
	r.Body.Append([]byte(text))
	cy := &scheduler.Cycle{Request: r, Profile: "default", Now: now(), Seed: 42}
	cy.Prompts[0] = scheduler.Prompt{Blocks: 16, BlockSize: 64, Tokens: 1000}
	return cy
}
