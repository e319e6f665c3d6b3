// SPDX-License-Identifier: Apache-2.0

package app

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/baton-epp/baton/simulate"
)

// discoveryOnly is a configuration that says where endpoints are and nothing else: llm-d's default profile, too.
const discoveryOnly = `apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: file-discovery, parameters: {path: endpoints.yaml, watchFile: true}}
dataLayer: {discovery: {pluginRef: file-discovery}}
`

// byDefault is a picker without a configuration file, only told where the endpoints are: llm-d's default profile.
func byDefault(s *stackOptions) {
	s.options = func(o *Options) {
		o.EndpointsFile, o.ConfigFile = filepath.Join(filepath.Dir(o.ConfigFile), "endpoints.yaml"), ""
		o.MetricsStaleness = time.Minute
	}
}

func distinct(i int) string {
	return fmt.Sprintf(`{"model":"tiny","max_tokens":4,"messages":[{"role":"user","content":"%d %s"}]}`, i, strings.Repeat("word ", 50))
}

// TestEnvoyBurst: 100 simultaneous distinct prompts on 10 idle endpoints, with the default profile: 10 each, give or
// take one. Simultaneous means between two scrapes, however slow this machine is: none is answered during the burst.
func TestEnvoyBurst(t *testing.T) {
	o := fast(0, 0)
	o.Plain, o.Template.PrefillFixed = 10, 3*time.Second
	options := stackOptions{pool: o}
	byDefault(&options)
	s := newStack(t, options)
	for _, e := range s.app.Snapshot().Endpoints {
		eventually(t, "every endpoint was scraped", func() bool { return e.Metrics().Has != 0 })
	}
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range 100 {
		wg.Go(func() {
			<-start
			r, err := s.try(t.Context(), http.MethodPost, "/v1/chat/completions", strings.NewReader(distinct(i)))
			if err != nil || r.status != http.StatusOK {
				t.Errorf("%v, %d: %s", err, r.status, r.body)
			}
		})
	}
	close(start)
	wg.Wait()
	counts := map[string]int{}
	for _, e := range s.pool.Engines() {
		counts[e.Name()] = e.Stats().Requests
		if n := e.Stats().Requests; n < 9 || n > 11 {
			t.Errorf("%s got %d of 100", e.Name(), n)
		}
	}
	t.Log(counts)

	s.settled()
}

// TestEnvoyEjection: one of four endpoints fails at once, which makes it look idle; after its ejection under 1 % of the
// requests see it.
func TestEnvoyEjection(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]simulate.Fault{
		"500":   {Kind: "status", Status: 500},
		"reset": {Kind: "reset_before_headers"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := fast(0, 0)
			o.Plain = 4
			s := newStack(t, stackOptions{pool: o, whole: discoveryOnly})
			sick := s.pool.Engine("engine-2")
			if err := sick.SetFaults(simulate.Faults{Rules: []simulate.Fault{fault}}); err != nil {
				t.Fatal(err)
			}
			next := 0
			eventually(t, "the ejection", func() bool {
				next++
				s.post("/v1/chat/completions", distinct(next))
				return s.sum("baton_director_ejections_total") > 0
			})
			if next > 400 {
				t.Errorf("ejected only after %d requests", next)
			}
			var failed atomic.Int64
			var wg sync.WaitGroup
			for w := range 10 {
				wg.Go(func() {
					for i := range 100 {
						r, err := s.try(t.Context(), http.MethodPost, "/v1/chat/completions", strings.NewReader(distinct(1000+100*w+i)))
						if err != nil || r.status != http.StatusOK {
							failed.Add(1)
						}
					}
				})
			}
			wg.Wait()
			if n := failed.Load(); n >= 10 {
				t.Errorf("%d of 1,000 requests failed", n)
			}
			t.Logf("ejected after %d requests; then %d of 1,000 failed", next, failed.Load())
			s.settled()
		})
	}
}
