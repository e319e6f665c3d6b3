// SPDX-License-Identifier: Apache-2.0

package scheduler_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/filters"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pickers"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/scorers"
)

// registries are all there are.
func registries() []scheduler.Registry {
	return []scheduler.Registry{scorers.Registry(), filters.Registry(), pickers.Registry()}
}

const header = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"

// load makes a scheduler of a file's text behind the header; no text is the built-in default.
func load(tb testing.TB, text string, change ...func(*scheduler.Options)) *scheduler.Scheduler {
	tb.Helper()
	s, err := tryLoad(tb, text, change...)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

func tryLoad(tb testing.TB, text string, change ...func(*scheduler.Options)) (*scheduler.Scheduler, error) {
	tb.Helper()
	cfg := config.Default()
	if text != "" {
		var err error
		if cfg, err = config.Load("test.yaml", []byte(header+text)); err != nil {
			tb.Fatal(err)
		}
	}
	o := scheduler.Options{Config: cfg, File: "test.yaml", Plugins: registries(), Metrics: prometheus.NewRegistry()}
	for _, f := range change {
		f(&o)
	}
	return scheduler.New(o)
}

// prompt is a request for the model "m" with that text.
func prompt(text string) *inference.Request {
	r := &inference.Request{
		API: inference.Completions, Model: "m", HasModel: true, N: 1, Prompts: 1,
		Text: []inference.Span{{Start: 0, End: len(text)}}, TextBytes: len(text),
	}
	r.Body.Append([]byte(text))
	return r
}

func query(snap *pool.Snapshot, text string) *scheduler.Query {
	return &scheduler.Query{Request: prompt(text), Snapshot: snap, Now: time.Now(), Rank: 1}
}

func names(p *scheduler.Pick) string {
	out := make([]string, len(p.Ranked))
	for i, r := range p.Ranked {
		out[i] = r.Endpoint.Name
	}
	return strings.Join(out, " ")
}

// TestBurst: 100 simultaneous distinct prompts on 10 idle endpoints spread to 10 ± 1 each.
func TestBurst(t *testing.T) {
	const requests, endpoints = 100, 10
	check := func(t *testing.T, snap *pool.Snapshot) {
		t.Helper()
		for _, e := range snap.Endpoints {
			if n := e.Load.Requests(); n < requests/endpoints-1 || n > requests/endpoints+1 {
				t.Errorf("%s got %d of %d requests", e.Name, n, requests)
			}
		}
	}
	text := func(i int) string { return strings.Repeat(fmt.Sprintf("prompt %d ", i), 100) }

	t.Run("one after the other, reserved by the caller", func(t *testing.T) {
		s, snap := load(t, ""), pooltest.Idle(endpoints)
		for i := range requests {
			d, err := s.Schedule(query(snap, text(i)))
			if err != nil {
				t.Fatal(err)
			}
			r := d.Phase(scheduler.PhaseDecode).Ranked[0]
			r.Endpoint.Load.Reserve(r.ReserveTokens)
			d.Learn(r.Endpoint, nil)
			d.Release()
		}
		check(t, snap)
	})
	t.Run("at once, reserved by Schedule", func(t *testing.T) {
		for range 20 {
			s, snap := load(t, ""), pooltest.Idle(endpoints)
			var wg sync.WaitGroup
			start := make(chan struct{})
			for i := range requests {
				wg.Go(func() {
					<-start
					q := query(snap, text(i))
					q.Reserve = true
					d, err := s.Schedule(q)
					if err != nil {
						t.Error(err)
						return
					}
					d.Learn(d.Phase(scheduler.PhaseDecode).Ranked[0].Endpoint, nil)
					d.Release()
				})
			}
			close(start)
			wg.Wait()
			check(t, snap)
		}
	})
}

func BenchmarkSchedule(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("endpoints=%d/scorers=4", n), func(b *testing.B) {
			s := load(b, fourScorers)
			snap := pooltest.Idle(n)
			q := query(snap, strings.Repeat("a prompt of four kilobytes ", 150))
			b.ReportAllocs()
			for b.Loop() {
				q.Now = time.Now()
				d, err := s.Schedule(q)
				if err != nil {
					b.Fatal(err)
				}
				d.Release()
			}
		})
	}
}

const fourScorers = `
plugins:
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: prefix-cache-scorer
- type: running-requests-size-scorer
`

// Example makes one decision: a profile, three endpoints, one of them idle.
func Example() {
	cfg, err := config.Load("epp.yaml", []byte(header+`
plugins: [{type: queue-scorer}, {type: max-score-picker, parameters: {maxNumOfEndpoints: 2}}]
`))
	if err != nil {
		fmt.Println(err)
		return
	}
	s, err := scheduler.New(scheduler.Options{
		Config: cfg, File: "epp.yaml", Metrics: prometheus.NewRegistry(),
		Plugins: []scheduler.Registry{scorers.Registry(), filters.Registry(), pickers.Registry()},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	snap := pooltest.Snapshot(pooltest.E("busy").Waiting(8), pooltest.E("idle"), pooltest.E("so-so").Waiting(2))
	d, err := s.Schedule(&scheduler.Query{Request: prompt("hello"), Snapshot: snap, Now: time.Now(), Rank: 3})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer d.Release()
	for _, r := range d.Phase(scheduler.PhaseDecode).Ranked {
		fmt.Println(r.Endpoint.Name, r.Score)
	}
	fmt.Println("named to the gateway:", d.Phase(scheduler.PhaseDecode).Send)
	// Output:
	// idle 1
	// so-so 0.75
	// busy 0
	// named to the gateway: 2
}
