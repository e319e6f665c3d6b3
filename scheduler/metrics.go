// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// timedOneIn is how many cycles go by for each one whose plugins are timed (kube-scheduler's rate).
const timedOneIn = 10

// metrics are shared by a scheduler and those that replace it. Labels that would need a look-up per pick (model,
// endpoint) are left out.
type metrics struct {
	e2e      prometheus.Histogram
	attempts struct{ success, failure prometheus.Counter }
	plugins  *prometheus.HistogramVec
	bad      *prometheus.CounterVec
	retries  prometheus.Counter
	disagg   *prometheus.CounterVec
	hitRatio *prometheus.HistogramVec
	hitBytes *prometheus.HistogramVec
	size     *prometheus.GaugeVec

	// Resolved for the present configuration by bind.
	decisions      [4]prometheus.Counter // by bit 0 prefill, bit 1 encode; nil = not counted
	ratio, hits    prometheus.Observer   // of the default producer
	indexSize      prometheus.Gauge
	defaultMatcher *prefixProducer
}

// newMetrics registers the scheduler's metrics under llm-d's names, or the older ones (llm-d-router v0.10).
func newMetrics(reg prometheus.Registerer, names string) (*metrics, error) {
	main, disagg := "llm_d_epp_", "llm_d_epp_"
	switch names {
	case "", "llm-d":
	case "gie":
		main, disagg = "inference_extension_", "llm_d_inference_scheduler_"
	default:
		return nil, fmt.Errorf("metric names %q, must be llm-d or gie", names)
	}
	plugin := []string{"plugin_name", "plugin_type"}
	m := &metrics{
		e2e: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: main + "scheduler_e2e_duration_seconds", Help: "Time from request facts to decision, all phases.",
			Buckets: []float64{.000005, .00001, .00002, .00005, .0001, .0002, .0005, .001, .002, .005, .01, .02, .05, .1},
		}),
		plugins: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: main + "plugin_duration_seconds", Help: "Time in one call of a plugin, measured in one cycle of ten.",
			Buckets: []float64{.0000002, .0000005, .000001, .000002, .000005, .00001, .00002, .00005, .0001, .001, .01},
		}, []string{"extension_point", "plugin_type", "plugin_name"}),
		bad: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "baton_scheduler_bad_scores_total", Help: "Scores that were not a number from 0 to 1 and counted as 0.",
		}, plugin),
		retries: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "baton_scheduler_retries_total",
			Help: "Choices made again because another request took the same endpoint at the same instant.",
		}),
		disagg: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: disagg + "disagg_decision_total", Help: "Decisions by the phases that run.",
		}, []string{"plugin_name", "plugin_type", "decision_type"}),
		hitRatio: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: main + "prefix_indexer_hit_ratio", Help: "Share of the prompt's blocks believed to be on the endpoint picked for decode.",
			Buckets: prometheus.LinearBuckets(0, .1, 11),
		}, plugin),
		hitBytes: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: main + "prefix_indexer_hit_bytes", Help: "Bytes of prompt believed to be on the endpoint picked for decode.",
			Buckets: prometheus.ExponentialBuckets(256, 4, 9),
		}, plugin),
		size: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: main + "prefix_indexer_size", Help: "Blocks in the prefix index, counted once per endpoint.",
		}, plugin),
	}
	attempts := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: main + "scheduler_attempts_total", Help: "Scheduling cycles by result.",
	}, []string{"status"})
	m.attempts.success, m.attempts.failure = attempts.WithLabelValues("success"), attempts.WithLabelValues("failure")
	var problems []error
	for _, c := range []prometheus.Collector{m.e2e, attempts, m.plugins, m.bad, m.retries, m.disagg, m.hitRatio, m.hitBytes, m.size} {
		problems = append(problems, reg.Register(c))
	}
	return m, errors.Join(problems...)
}

// timer is the series of one plugin at one extension point.
func (m *metrics) timer(point string, b *built) prometheus.Observer {
	return m.plugins.WithLabelValues(point, b.kind, b.name)
}

// forScheduler returns the metrics with the series of s resolved, so that no pick looks one up.
func (m *metrics) forScheduler(s *Scheduler) *metrics {
	bound := *m
	bound.decisions = [4]prometheus.Counter{}
	if s.Disaggregates() {
		for i, kind := range [4]string{"decode-only", "prefill-decode", "encode-decode", "encode-prefill-decode"} {
			bound.decisions[i] = m.disagg.WithLabelValues(s.phases.name, s.phases.kind, kind)
		}
	}
	bound.ratio, bound.hits, bound.indexSize, bound.defaultMatcher = nil, nil, nil, nil
	if len(s.matchers) > 0 {
		if p, ok := s.matchers[0].(*prefixProducer); ok {
			name := typePrefixProducer
			for _, b := range s.plugins {
				if b.value == any(p) {
					name = b.name
				}
			}
			bound.ratio = m.hitRatio.WithLabelValues(name, typePrefixProducer)
			bound.hits = m.hitBytes.WithLabelValues(name, typePrefixProducer)
			bound.indexSize = m.size.WithLabelValues(name, typePrefixProducer)
			bound.defaultMatcher = p
		}
	}
	return &bound
}

// observe counts one cycle.
func (m *metrics) observe(d *Decision, err error, took time.Duration) {
	m.e2e.Observe(took.Seconds())
	if err != nil {
		m.attempts.failure.Inc()
		return
	}
	m.attempts.success.Inc()
	kind := 0
	if d.Picks[PhasePrefill].Run {
		kind |= 1
	}
	if d.Picks[PhaseEncode].Run {
		kind |= 2
	}
	if c := m.decisions[kind]; c != nil {
		c.Inc()
	}
	if m.defaultMatcher == nil || d.Prompt.Blocks == 0 {
		return
	}
	matched := float64(d.Picks[PhaseDecode].Ranked[0].Matched)
	m.ratio.Observe(matched / float64(d.Prompt.Blocks))
	m.hits.Observe(matched * float64(d.Prompt.BlockSize) * 4)
	m.indexSize.Set(float64(m.defaultMatcher.index.Blocks()))
}
