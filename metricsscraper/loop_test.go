// SPDX-License-Identifier: Apache-2.0

package metricsscraper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/pool"
)

const (
	smallPage = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
	cacheLine = "vllm:cache_config_info{block_size=\"32\",num_gpu_blocks=\"400\"} 1\n"
)

// server answers in memory, so that time can be virtual.
type server struct {
	mu     sync.Mutex
	answer func(req *http.Request) (status int, body string, err error)
	asked  []string // "host path?query"
}

func (s *server) RoundTrip(req *http.Request) (*http.Response, error) {
	s.mu.Lock()
	s.asked = append(s.asked, req.URL.Host+" "+req.URL.RequestURI())
	answer := s.answer
	s.mu.Unlock()
	status, body, err := answer(req)
	if err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: status, Status: http.StatusText(status), Body: io.NopCloser(strings.NewReader(body)), Request: req}, nil
}

// set replaces the answer.
func (s *server) set(answer func(req *http.Request) (int, string, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}

// take returns what was asked since the last take.
func (s *server) take() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.asked
	s.asked = nil
	return asked
}

// always ignores the name filter.
func always(page string) func(*http.Request) (int, string, error) {
	return func(*http.Request) (int, string, error) { return http.StatusOK, page, nil }
}

// filtering sends cache information only when asked for it, and a large page without a filter.
func filtering(req *http.Request) (int, string, error) {
	switch {
	case req.URL.RawQuery == "":
		return http.StatusOK, smallPage + cacheLine + strings.Repeat("# filler\n", 5000), nil
	case strings.Contains(req.URL.RawQuery, "cache_config_info"):
		return http.StatusOK, smallPage + cacheLine, nil
	default:
		return http.StatusOK, smallPage, nil
	}
}

func refused(*http.Request) (int, string, error) {
	return 0, "", fmt.Errorf("dial: %w", syscall.ECONNREFUSED)
}

func endpoint(addr string) *pool.Endpoint {
	return &pool.Endpoint{Name: addr, UID: addr, Addr: netip.MustParseAddrPort(addr), Hostport: addr, State: &pool.State{}}
}

func snapshot(endpoints ...*pool.Endpoint) *pool.Snapshot {
	return pool.NewSnapshot(1, true, endpoints)
}

func options() Options {
	return Options{
		Scraping: config.Default().Scraping, RefusedMeansNotReady: true,
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}
}

// start runs a scraper against srv in virtual time until the test ends.
func start(t *testing.T, opts Options, srv *server, endpoints ...*pool.Endpoint) *Scraper {
	t.Helper()
	s, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	s.client = &http.Client{Transport: srv}
	s.Sync(snapshot(endpoints...))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s
}

// pass lets virtual time pass.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func TestIntervalFollowsLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := &server{answer: always(smallPage)}
		e := endpoint("10.0.0.1:8000")
		start(t, options(), srv, e)
		f := func(d time.Duration, low, high int) {
			t.Helper()
			srv.take()
			pass(d)
			if n := len(srv.take()); n < low || n > high {
				t.Errorf("%d scrapes in %v, want %d to %d", n, d, low, high)
			}
		}
		f(250*time.Millisecond, 1, 1) // the first comes soon
		pass(3 * time.Second)         // the second at the endpoint's own phase
		f(20*time.Second, 10, 10)
		m := e.Metrics()
		if m.FreshUntil.Sub(m.Begun) != 4*time.Second || !m.Fresh(time.Now()) {
			t.Errorf("idle: fresh for %v", m.FreshUntil.Sub(m.Begun))
		}
		res := e.Load.Reserve(100)
		f(100*time.Millisecond, 1, 3) // woken
		f(2*time.Second, 38, 42)
		m = e.Metrics()
		if m.FreshUntil.Sub(m.Begun) != 2050*time.Millisecond || m.Started != 1 || e.Load.SinceScrape(m) != 0 {
			t.Errorf("busy: %+v", m)
		}
		res.Release()
		pass(200 * time.Millisecond)
		f(20*time.Second, 10, 10)
		// The page alone can say that there is work.
		srv.set(always("vllm:num_requests_running 1\n"))
		pass(2 * time.Second)
		f(2*time.Second, 38, 42)
	})
}

func TestEstimatesEndWithTheSecondScrape(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := endpoint("10.0.0.1:8000")
		start(t, options(), &server{answer: always(smallPage)}, e)
		pass(5 * time.Second)
		res := e.Load.Reserve(1)
		res.Expire(time.Now(), time.Minute)
		pass(300 * time.Millisecond)
		if n := e.Load.Requests(); n != 0 {
			t.Errorf("%d requests in flight", n)
		}
	})
}

func TestRefusedMeansNotReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := &server{answer: refused}
		e := endpoint("10.0.0.1:8000")
		opts := options()
		reg := prometheus.NewRegistry()
		opts.Registerer = reg
		start(t, opts, srv, e)
		pass(time.Second)
		if e.Health.Standing(time.Now()) != pool.NotReady {
			t.Error("ready although nobody is there")
		}
		if got := sample(t, reg, "llm_d_epp_datalayer_poll_errors_total", reasonRefused); got < 2 {
			t.Errorf("%v refused, want 2 or more", got)
		}
		if got := sample(t, reg, "baton_metricsscraper_stale_endpoints", ""); got != 1 {
			t.Errorf("%v stale, want 1", got)
		}
		srv.take()
		pass(20 * time.Second)
		if n := len(srv.take()); n > 12 {
			t.Errorf("%d attempts in 20 s", n)
		}
		srv.set(always(smallPage))
		pass(3 * time.Second)
		if e.Health.Standing(time.Now()) != pool.Healthy || !e.Metrics().Fresh(time.Now()) {
			t.Error("not ready although it answers")
		}
		// Other failures only make values stale.
		srv.set(func(*http.Request) (int, string, error) { return 500, "", nil })
		pass(10 * time.Second)
		if e.Health.Standing(time.Now()) != pool.Healthy || e.Metrics().Fresh(time.Now()) {
			t.Error("a failing page must make stale, and nothing else")
		}
	})
}

func TestNameFilter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := &server{answer: filtering}
		e := endpoint("10.0.0.1:8000")
		start(t, options(), srv, e)
		pass(125 * time.Second)
		cached, plain := 0, 0
		for _, asked := range srv.take() {
			switch {
			case strings.Contains(asked, "cache_config_info"):
				cached++
			case strings.Contains(asked, "/metrics/?name%5B%5D=vllm%3Anum_requests_waiting&"):
				plain++
			default:
				t.Errorf("asked %s", asked)
			}
		}
		if cached != 3 || plain < 55 {
			t.Errorf("cache information asked %d times, not asked %d times", cached, plain)
		}
		want := &pool.Metrics{Has: pool.HasRunning | pool.HasWaiting | pool.HasCacheConfig, BlockSize: 32, NumBlocks: 400}
		got := *e.Metrics()
		got.Begun, got.FreshUntil = time.Time{}, time.Time{}
		if diff := cmp.Diff(want, &got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

func TestNameFilterNotKnown(t *testing.T) {
	large := smallPage + strings.Repeat("# filler\n", 5000)
	tests := []struct {
		name    string
		answer  func(*http.Request) (int, string, error)
		filters int // how often the filter was tried in the first second
	}{
		{"ignored", always(large), 1},
		{"not found", func(req *http.Request) (int, string, error) {
			if req.URL.RawQuery != "" {
				return 404, "", nil
			}
			return 200, large, nil
		}, 1},
		{"redirect", func(req *http.Request) (int, string, error) {
			if req.URL.Path != "/metrics" {
				return 307, "", nil
			}
			return 200, large, nil
		}, 1},
		{"empty page", func(req *http.Request) (int, string, error) {
			if req.URL.RawQuery != "" {
				return 200, "", nil
			}
			return 200, large, nil
		}, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				srv := &server{answer: tt.answer}
				e := endpoint("10.0.0.1:8000")
				defer e.Load.Reserve(1).Release()
				start(t, options(), srv, e)
				count := func() (filters int) {
					for _, asked := range srv.take() {
						if strings.Contains(asked, "?") {
							filters++
						}
					}
					return filters
				}
				pass(time.Second)
				if !e.Metrics().Fresh(time.Now()) {
					t.Error("no values")
				}
				if n := count(); n != tt.filters {
					t.Errorf("filter tried %d times, want %d", n, tt.filters)
				}
				// Another server after an error: tried again.
				srv.set(func(*http.Request) (int, string, error) { return 0, "", errors.New("reset") })
				pass(60 * time.Millisecond)
				srv.take()
				srv.set(filtering)
				pass(5 * time.Second)
				if n := count(); n < 10 {
					t.Errorf("filter used %d times after a restart", n)
				}
			})
		})
	}
}

func TestSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var inFlight atomic.Int32
		srv := &server{answer: always(smallPage)}
		a, b := endpoint("10.0.0.1:8000"), endpoint("10.0.0.2:8000")
		s := start(t, options(), srv, a, b)
		pass(3 * time.Second)
		if got := hosts(srv.take()); got != "10.0.0.1:8000 10.0.0.2:8000" {
			t.Errorf("scraped %s", got)
		}
		// a moves to another address, b goes. The old loop of a hangs in a scrape and must end first.
		block := make(chan struct{})
		srv.set(func(req *http.Request) (int, string, error) {
			if req.URL.Host == "10.0.0.2:8000" {
				return http.StatusOK, smallPage, nil
			}
			if inFlight.Add(1) > 1 {
				t.Error("two writers for one state")
			}
			defer inFlight.Add(-1)
			<-block // also against the context, as a stuck read would
			return 0, "", errors.New("gone")
		})
		a.Load.Reserve(1)
		pass(100 * time.Millisecond)
		moved := *a
		moved.Addr = netip.MustParseAddrPort("10.0.0.9:8000")
		s.Sync(snapshot(&moved))
		pass(time.Second)
		srv.take()
		srv.set(always(smallPage))
		close(block)
		pass(5 * time.Second)
		if got := hosts(srv.take()); got != "10.0.0.9:8000" {
			t.Errorf("scraped %s", got)
		}
		// New labels only: the loop goes on.
		same := moved
		same.Labels = map[string]string{"x": "y"}
		before := s.targets[same.State]
		s.Sync(snapshot(&same))
		pass(time.Second)
		if s.targets[same.State] != before {
			t.Error("the loop was restarted for nothing")
		}
		s.Close()
		srv.take()
		if pass(5 * time.Second); len(srv.take()) > 0 {
			t.Error("scrapes after Close")
		}
	})
}

// hosts lists the hosts that were asked, sorted by first appearance in the alphabet.
func hosts(asked []string) string {
	seen := map[string]bool{}
	for _, a := range asked {
		host, _, _ := strings.Cut(a, " ")
		seen[host] = true
	}
	var out []string
	for _, h := range []string{"10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.9:8000"} {
		if seen[h] {
			out = append(out, h)
		}
	}
	return strings.Join(out, " ")
}

// sample reads one series: the family's first, or the one with the reason.
func sample(t *testing.T, reg *prometheus.Registry, name, why string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && (why == "" || m.GetLabel()[0].GetValue() == why) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no series %s{%s}", name, why)
	return 0
}
