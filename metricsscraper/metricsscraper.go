// SPDX-License-Identifier: Apache-2.0

// Package metricsscraper keeps the endpoints' metrics young. A [Scraper] runs one loop per endpoint over a kept
// connection, often while the endpoint serves requests and seldom while it is idle, picks the few wanted families out
// of each page and publishes them as [pool.Metrics]. Floor 1: it imports pool and config.
package metricsscraper

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/pool"
)

// Defaults of llm-d's flags (llm-d-router v0.10).
const (
	DefaultMinInterval = 50 * time.Millisecond
	DefaultStaleness   = 2 * time.Second
)

// Options of a Scraper.
type Options struct {
	Scraping config.Scraping // required: intervals, timeout, page cap, name filter
	// MinInterval is the lower bound of both intervals (--refresh-metrics-interval); 0 = DefaultMinInterval.
	MinInterval time.Duration
	// Staleness is how long past the next expected scrape values are believed (--metrics-staleness-threshold);
	// 0 = DefaultStaleness.
	Staleness time.Duration
	Source    Source   // the zero Source means DefaultSource
	Engines   *Engines // nil means DefaultEngines
	// RefusedMeansNotReady makes two refused connections in a row take an endpoint out until it answers again: for
	// file discovery, where nobody else reports readiness (docs/design.md 5.2).
	RefusedMeansNotReady bool
	MetricsNames         string                // llm-d (default) or gie
	Logger               *slog.Logger          // required
	Registerer           prometheus.Registerer // required
}

// Scraper runs the loops. Safe for concurrent use.
type Scraper struct {
	opts     Options // immutable, defaults applied
	log      *slog.Logger
	metrics  *metrics
	client   *http.Client
	buffers  sync.Pool // *page
	filter   bool      // the name filter may be tried
	snapshot atomic.Pointer[pool.Snapshot]
	changed  chan struct{} // capacity 1: snapshot was replaced
	closing  chan struct{}
	close    sync.Once
	running  sync.WaitGroup

	// Owned by Run. Only Run starts loops, and a target's next loop starts after its last one has ended, so that no
	// state ever has two writers.
	targets map[*pool.State]*target
}

// New makes a Scraper; Run starts the loops.
func New(opts Options) (*Scraper, error) {
	if opts.Logger == nil || opts.Registerer == nil {
		return nil, errors.New("metricsscraper: Logger and Registerer are required")
	}
	s := opts.Scraping
	if s.BusyInterval <= 0 || s.IdleInterval < s.BusyInterval || s.Timeout <= 0 || s.MaxPageBytes <= 0 {
		return nil, fmt.Errorf("metricsscraper: scraping %+v: intervals, timeout and page size must be positive", s)
	}
	opts.Source = cmp.Or(opts.Source, DefaultSource())
	opts.Engines = cmp.Or(opts.Engines, DefaultEngines())
	opts.Staleness = cmp.Or(opts.Staleness, DefaultStaleness)
	low := max(cmp.Or(opts.MinInterval, DefaultMinInterval), opts.Source.Interval)
	opts.Scraping.BusyInterval = max(opts.Scraping.BusyInterval, low)
	opts.Scraping.IdleInterval = max(opts.Scraping.IdleInterval, low)
	client, err := newClient(opts.Source, opts.Scraping.Timeout)
	if err != nil {
		return nil, err
	}
	sc := &Scraper{
		opts:    opts,
		log:     opts.Logger.With(slog.String("component", "metricsscraper")),
		client:  client,
		filter:  opts.Scraping.NameFilter != "never" && opts.Source.Path == "/metrics",
		changed: make(chan struct{}, 1),
		closing: make(chan struct{}),
		targets: map[*pool.State]*target{},
	}
	sc.buffers.New = func() any { return &page{} }
	if sc.metrics, err = newMetrics(opts.Registerer, opts.MetricsNames, sc.stale); err != nil {
		return nil, err
	}
	if opts.Engines.CustomMetrics {
		sc.log.Warn("customMetrics of core-metrics-extractor are not read yet")
	}
	return sc, nil
}

// Sync tells which endpoints to scrape. It returns at once; the newest snapshot counts.
func (s *Scraper) Sync(snapshot *pool.Snapshot) {
	s.snapshot.Store(snapshot)
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// Run scrapes until ctx ends or Close is called, and returns when all loops have ended. Call it once.
func (s *Scraper) Run(ctx context.Context) error {
	s.running.Add(1)
	defer s.running.Done()
	defer s.client.CloseIdleConnections()
	ctx, cancel := context.WithCancel(ctx)
	var loops sync.WaitGroup
	defer loops.Wait()
	defer cancel()
	tick := time.NewTicker(s.opts.Scraping.BusyInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.closing:
			return nil
		case <-s.changed:
			s.diff(ctx, &loops)
		case <-tick.C:
			for _, t := range s.targets {
				t.wakeIfBusy()
			}
		}
	}
}

// Close ends Run and waits for it.
func (s *Scraper) Close() {
	s.close.Do(func() { close(s.closing) })
	s.running.Wait()
}

// diff starts and stops loops so that they are those of the snapshot.
func (s *Scraper) diff(ctx context.Context, loops *sync.WaitGroup) {
	snapshot := s.snapshot.Load()
	if snapshot == nil {
		return
	}
	wanted := make(map[*pool.State]bool, len(snapshot.Endpoints))
	for _, e := range snapshot.Endpoints {
		wanted[e.State] = true
		engine := s.opts.Engines.of(e)
		old := s.targets[e.State]
		if old != nil && old.endpoint.Addr == e.Addr && old.table == engine {
			continue
		}
		loop, cancel := context.WithCancel(ctx)
		t := s.newTarget(loop, e, engine)
		t.cancel = cancel
		if old != nil {
			old.cancel()
			t.after = old.done
		}
		s.targets[e.State] = t
		loops.Go(func() { t.run(loop) })
	}
	for state, t := range s.targets {
		if !wanted[state] {
			t.cancel()
			delete(s.targets, state)
		}
	}
}

// stale counts the endpoints whose values may not be believed.
func (s *Scraper) stale() float64 {
	snapshot := s.snapshot.Load()
	if snapshot == nil {
		return 0
	}
	now, n := time.Now(), 0.0
	for _, e := range snapshot.Endpoints {
		if !e.Metrics().Fresh(now) {
			n++
		}
	}
	return n
}

// phase is a share of d that is the endpoint's own: it spreads scrapes and is the same after a restart.
func phase(e *pool.Endpoint, d time.Duration) time.Duration {
	h := fnv.New64a()
	_, _ = h.Write([]byte(e.UID + e.Hostport))
	return time.Duration(h.Sum64() % uint64(max(1, d))) //nolint:gosec // d is positive
}
