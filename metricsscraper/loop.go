// SPDX-License-Identifier: Apache-2.0

package metricsscraper

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/baton-epp/baton/pool"
)

const (
	// firstWithin bounds the wait for an endpoint's first scrape: what is not scraped cannot be scored.
	firstWithin = 250 * time.Millisecond
	// cacheEvery is how often a filtering server is asked for its cache configuration, which is more than half of a
	// filtered page (measured on vLLM 0.32).
	cacheEvery = time.Minute
	// refusedLimit is how many refused connections in a row mean that nobody is there (docs/design.md 5.2).
	refusedLimit = 2
)

// target is one endpoint's loop.
type target struct {
	scraper  *Scraper
	endpoint *pool.Endpoint
	cancel   context.CancelFunc
	after    <-chan struct{} // the loop before on the same state; nil when there was none
	done     chan struct{}
	wake     chan struct{} // capacity 1
	idle     atomic.Bool   // the loop waits for the idle interval

	// Owned by the loop.
	fetcher
	extractor
	reading  reading
	failures int
	refused  int
	scrapes  int
	started  int64 // Load.Started at the last scrape
}

func (s *Scraper) newTarget(ctx context.Context, e *pool.Endpoint, engine *table) *target {
	return &target{
		scraper:  s,
		endpoint: e,
		done:     make(chan struct{}),
		wake:     make(chan struct{}, 1),
		fetcher:  s.newFetcher(ctx, e, engine),
	}
}

// run scrapes until ctx ends.
func (t *target) run(ctx context.Context) {
	defer close(t.done)
	if t.after != nil {
		<-t.after // it was told to end
	}
	timer := time.NewTimer(phase(t.endpoint, min(firstWithin, t.scraper.opts.Scraping.IdleInterval)))
	defer timer.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-t.wake:
		}
		t.idle.Store(false)
		timer.Reset(t.scrape(ctx))
	}
}

// wakeIfBusy ends an idle wait when requests were sent to the endpoint.
func (t *target) wakeIfBusy() {
	if t.endpoint.Load.Requests() > 0 && t.idle.CompareAndSwap(true, false) {
		select {
		case t.wake <- struct{}{}:
		default:
		}
	}
}

// scrape fetches one page, publishes what it says and returns how long to wait for the next.
func (t *target) scrape(ctx context.Context) time.Duration {
	s := t.scraper
	begun := time.Now()
	// Ages what was estimated; a scrape that will probably fail is only a tick of the clock.
	t.endpoint.Load.ScrapeBegins(begun, t.failures == 0)
	started := t.endpoint.Load.Started()
	m := &pool.Metrics{Begun: begun, Started: t.endpoint.Load.Settled(begun)}
	withCache, err := t.fetch(ctx, begun, &t.reading)
	if ctx.Err() != nil {
		return 0
	}
	s.metrics.duration.Observe(time.Since(begun).Seconds())
	if err != nil {
		return t.fail(ctx, err)
	}
	t.succeed(ctx)
	t.extract(&t.reading, m, t.endpoint.Metrics(), withCache)
	wait, idle := t.interval(m)
	t.started = started
	m.FreshUntil = begun.Add(wait + s.opts.Staleness)
	t.endpoint.SetMetrics(m)
	if t.scrapes++; t.scrapes == 1 && idle {
		wait = phase(t.endpoint, wait) // from now on spread over the whole interval
	}
	t.idle.Store(idle)
	return max(0, wait-time.Since(begun))
}

// interval is the wait for the next scrape and whether it is the idle one.
func (t *target) interval(m *pool.Metrics) (time.Duration, bool) {
	busy := m.Running+m.Waiting > 0 || t.endpoint.Load.Requests() > 0 || t.endpoint.Load.Started() != t.started
	if busy {
		return t.scraper.opts.Scraping.BusyInterval, false
	}
	return t.scraper.opts.Scraping.IdleInterval, true
}

func (t *target) succeed(ctx context.Context) {
	t.scraper.metrics.scrapes.Inc()
	t.answered(ctx)
	t.failures = 0
}

// answered notes that somebody is there. The first answer counts too: a scraper before may have seen nobody.
func (t *target) answered(ctx context.Context) {
	if t.scraper.opts.RefusedMeansNotReady && (t.scrapes == 0 || t.refused >= refusedLimit) {
		t.endpoint.Health.SetReady(true)
	}
	if t.refused >= refusedLimit {
		t.log(ctx, slog.LevelInfo, "endpoint answers again", nil)
	}
	t.refused = 0
}

// fail counts a failed scrape. The old values stay and grow stale. Retries back off from the busy to the idle interval.
func (t *target) fail(ctx context.Context, err error) time.Duration {
	why := reason(err)
	t.scraper.metrics.errors.WithLabelValues(why).Inc()
	if t.failures++; t.failures == 1 {
		t.log(ctx, slog.LevelDebug, "scrape", err)
	}
	switch why {
	case reasonRefused:
		if t.refused++; t.refused == refusedLimit && t.scraper.opts.RefusedMeansNotReady {
			t.endpoint.Health.SetReady(false)
			t.log(ctx, slog.LevelWarn, "endpoint refuses connections", err)
		}
	case reasonStatus, reasonTooLarge, reasonNoMetric:
		t.answered(ctx)
	default:
		if t.refused < refusedLimit {
			t.refused = 0 // not in a row
		}
	}
	in := t.scraper.opts.Scraping
	return min(in.BusyInterval<<min(t.failures-1, 16), in.IdleInterval)
}

func (t *target) log(ctx context.Context, level slog.Level, msg string, err error) {
	attrs := []slog.Attr{slog.String("endpoint", t.endpoint.ID())}
	if err != nil {
		attrs = append(attrs, slog.Any("err", err))
	}
	t.scraper.log.LogAttrs(ctx, level, msg, attrs...) //nolint:sloglint // msg is a constant of the three callers
}
