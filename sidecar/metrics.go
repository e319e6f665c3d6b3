// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/sony/gobreaker/v2"

	"github.com/baton-epp/baton/scheduler"
)

// The values of the label scope.
const (
	scopeEndpoint = "endpoint"
	scopePair     = "pair"
)

// Why the blocks of a finished prefill can no longer be claimed: reasons of attempts, and these.
const (
	leakClientGone   = "client_gone"
	leakNoDecode     = "no_decode"
	leakOther        = "other"
	leakAnswerLost   = "answer_lost"   // the prefill answered 200, and the rest of the answer did not arrive
	leakRefused      = "refused"       // the decode server answered before it read the body: 401, 403, 404, 405, 3xx
	leakNotSent      = "not_sent"      // the answer to the gateway could not be delivered
	leakNotDelivered = "not_delivered" // the gateway did not reach the decode endpoint
)

func leakReasons() []string {
	return []string{
		leakClientGone, leakNoDecode, leakOther, leakAnswerLost, leakRefused, leakNotSent, leakNotDelivered, reasonTooLarge, reasonIncomplete,
		reasonExpired, reasonUsed, reasonEngineMismatch, reasonDecodeChanged,
	}
}

type metrics struct {
	attempts       *prometheus.CounterVec
	phaseSeconds   *prometheus.HistogramVec
	slotWait       prometheus.Histogram
	fallbacks      *prometheus.CounterVec
	retries        prometheus.Counter
	retriesRefused prometheus.Counter
	replays        prometheus.Counter
	trips          *prometheus.CounterVec
	inFlight       *prometheus.GaugeVec
	heldBytes      prometheus.Gauge
	sentBytes      *prometheus.CounterVec
	receivedBytes  *prometheus.CounterVec
	checkpoints    *prometheus.CounterVec
	encodeItems    *prometheus.CounterVec
	hostRewritten  prometheus.Counter
	misrouted      prometheus.Counter
	transferFailed prometheus.Counter
	leaked         *prometheus.CounterVec
	leakedTokens   prometheus.Counter
	reclaimed      *prometheus.CounterVec
	aborts         *prometheus.CounterVec
	looped         prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	counter := func(name, help string) prometheus.Counter {
		return f.NewCounter(prometheus.CounterOpts{Namespace: "baton", Subsystem: "sidecar", Name: name, Help: help})
	}
	vector := func(name, help string, labels ...string) *prometheus.CounterVec {
		return f.NewCounterVec(prometheus.CounterOpts{Namespace: "baton", Subsystem: "sidecar", Name: name, Help: help}, labels)
	}
	m := &metrics{
		attempts: vector("attempts_total", "Sub-requests by phase and how they ended; of phase decode only the question whether it holds enough of the prompt.", "phase", "reason"),
		phaseSeconds: f.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "baton", Subsystem: "sidecar", Name: "phase_duration_seconds",
			Help:    "Time a request spent in a phase, all its attempts together.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120},
		}, []string{"phase"}),
		slotWait: f.NewHistogram(prometheus.HistogramOpts{
			Namespace: "baton", Subsystem: "sidecar", Name: "slot_wait_seconds",
			Help:    "Time that attempts waited for a free slot of their endpoint; those that did not wait are not in it.",
			Buckets: []float64{.001, .005, .025, .1, .5, 1, 5, 10, 30, 60},
		}),
		fallbacks:      vector("fallbacks_total", "Requests that were to be disaggregated and went to decode alone, by reason.", "reason"),
		retries:        counter("retries_total", "Attempts on another endpoint after a failed one."),
		retriesRefused: counter("retries_refused_total", "Attempts not made because the pool-wide retry budget was spent."),
		replays:        counter("replays_total", "Sub-requests sent anew within their attempt because a kept connection turned out closed."),
		trips:          vector("breaker_trips_total", "Circuit breakers opened, of endpoints and of prefill-decode pairs.", "scope"),
		inFlight: f.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: "baton", Subsystem: "sidecar", Name: "in_flight", Help: "Sub-requests in flight by phase.",
		}, []string{"phase"}),
		heldBytes: f.NewGauge(prometheus.GaugeOpts{
			Namespace: "baton", Subsystem: "sidecar", Name: "held_bytes",
			Help: "Bytes held by sub-requests beside the client's body: what was spliced in, and answers while they are read.",
		}),
		sentBytes:      vector("sent_bytes_total", "Body bytes of sub-requests by phase.", "phase"),
		receivedBytes:  vector("received_bytes_total", "Body bytes of answers to sub-requests by phase.", "phase"),
		checkpoints:    vector("checkpoints_total", "Requests that reached a checkpoint.", "checkpoint"),
		encodeItems:    vector("encode_items_total", "Media items of requests with an encode phase, by what became of them.", "result"),
		hostRewritten:  counter("remote_host_rewritten_total", "Handles whose loopback remote_host was replaced by the prefiller's address."),
		misrouted:      counter("handle_misrouted_total", "Requests with a handle that were served by another endpoint than the one named."),
		transferFailed: counter("transfers_failed_total", "Requests with a handle that their decode endpoint failed."),
		leaked:         vector("leaked_prefill_total", "Finished prefills whose blocks nobody claims, by reason.", "reason"),
		leakedTokens:   counter("leaked_prefill_tokens_total", "Prompt tokens of leaked prefills."),
		reclaimed:      vector("reclaims_total", "Requests sent to claim and drop a leaked prefill, by result.", "result"),
		aborts:         vector("aborts_total", "Requests sent to end a decode that waits in vain for its prefill, by result.", "result"),
		looped:         counter("looped_total", "Own sub-requests that came back through the gateway and were refused."),
	}
	m.startAtZero()
	return m
}

// startAtZero makes every series exist.
func (m *metrics) startAtZero() {
	for _, phase := range []string{scheduler.PhaseEncode.String(), scheduler.PhasePrefill.String()} {
		for _, reason := range Reasons() {
			m.attempts.WithLabelValues(phase, reason)
		}
		m.phaseSeconds.WithLabelValues(phase)
		m.inFlight.WithLabelValues(phase)
		m.sentBytes.WithLabelValues(phase)
		m.receivedBytes.WithLabelValues(phase)
	}
	decode := scheduler.PhaseDecode.String()
	m.inFlight.WithLabelValues(decode)
	m.sentBytes.WithLabelValues(decode)
	m.receivedBytes.WithLabelValues(decode)
	for _, reason := range questionReasons() {
		m.attempts.WithLabelValues(decode, reason)
	}
	for _, reason := range FallbackReasons() {
		m.fallbacks.WithLabelValues(reason)
	}
	for _, scope := range []string{scopeEndpoint, scopePair} {
		m.trips.WithLabelValues(scope)
	}
	for _, result := range []string{itemEncoded, itemDeduplicated, itemLocal, itemSkipped, itemFailed} {
		m.encodeItems.WithLabelValues(result)
	}
	for c := EncodeComplete; c <= DecodeForwarded; c++ {
		m.checkpoints.WithLabelValues(c.String())
	}
	for _, reason := range leakReasons() {
		m.leaked.WithLabelValues(reason)
	}
	for _, result := range []string{reclaimOK, reclaimFailed} {
		m.reclaimed.WithLabelValues(result)
	}
	for _, result := range []string{abortOK, abortFailed} {
		m.aborts.WithLabelValues(result)
	}
}

// leak counts a finished prefill that nobody claims.
func (m *metrics) leak(reason string, tokens int64) {
	m.leaked.WithLabelValues(reason).Inc()
	m.leakedTokens.Add(float64(max(0, tokens)))
}

// breakerCollector shows the states of breakers as they are when asked.
type breakerCollector struct {
	peers *peers
	desc  *prometheus.Desc
}

func newBreakerCollector(p *peers) breakerCollector {
	return breakerCollector{p, prometheus.NewDesc("baton_sidecar_breakers",
		"Circuit breakers that are not closed, of endpoints and of prefill-decode pairs.", []string{"scope", "state"}, nil)}
}

// Describe implements prometheus.Collector.
func (c breakerCollector) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc }

// Collect implements prometheus.Collector.
func (c breakerCollector) Collect(ch chan<- prometheus.Metric) {
	endpoints, pairs := c.peers.count()
	for scope, counts := range map[string][breakerStates]int{scopeEndpoint: endpoints, scopePair: pairs} {
		for state, name := range map[gobreaker.State]string{gobreaker.StateOpen: "open", gobreaker.StateHalfOpen: "half_open"} {
			ch <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, float64(counts[state]), scope, name)
		}
	}
}
