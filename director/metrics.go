// SPDX-License-Identifier: Apache-2.0

package director

import (
	"context"
	"errors"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/admission"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar"
)

// maxModels caps how many model names become label values; the rest are "other" (llm-d's number).
const maxModels = 1000

// metrics are llm-d's request metrics (reference names, so that dashboards go on working) and Baton's own.
type metrics struct {
	requests, errors                    *prometheus.CounterVec
	running                             *prometheus.GaugeVec
	seconds, ttft                       *prometheus.HistogramVec
	requestBytes, responseBytes         *prometheus.HistogramVec
	inputTokens, outputTokens, cachedTk *prometheus.HistogramVec
	decision                            prometheus.Histogram
	repicked, ejections                 prometheus.Counter
	outcomes                            *prometheus.CounterVec

	mu     sync.Mutex                         // guards additions to models
	models atomic.Pointer[map[string]*series] // copied on write; a model's series are resolved once
}

// series are one model's metrics, resolved so that no request looks a label up.
type series struct {
	requests                    prometheus.Counter
	running                     prometheus.Gauge
	seconds, ttft, ttftStream   prometheus.Observer
	requestBytes, responseBytes prometheus.Observer
	input, output, cached       prometheus.Observer
}

// metricName is a request metric's name: llm-d's, or with names gie the old EPP's (same labels), for dashboards made for it.
func metricName(names, metric string) string {
	if names != "gie" {
		return "llm_d_epp_" + metric
	}
	switch metric {
	case "request_size_bytes":
		metric = "request_sizes"
	case "response_size_bytes":
		metric = "response_sizes"
	case "request_input_tokens":
		metric = "input_tokens"
	case "request_output_tokens":
		metric = "output_tokens"
	case "request_cached_tokens":
		metric = "prompt_cached_tokens"
	case "request_running":
		metric = "running_requests"
	}
	return "inference_objective_" + metric
}

func newMetrics(reg prometheus.Registerer, names string) *metrics {
	labels := []string{"model_name", "target_model_name", "fairness_id", "priority"}
	secs := []float64{0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 45, 60, 120, 180, 240, 300, 360, 480, 600, 900, 1200, 1800, 2700, 3600}
	bytes := []float64{64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576, 2097152, 4194304, 8388608, 16777216, 33554432, 67108864}
	tokens := []float64{1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576}
	counter := func(name, help string, l ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, l)
	}
	histogram := func(name, help string, b []float64, l ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: b}, l)
	}
	plain := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		requests: counter(metricName(names, "request_total"), "Requests for which endpoints were picked.", labels...),
		errors:   counter(metricName(names, "request_error_total"), "Requests answered with an error by the picker.", append(labels, "error_code")...),
		running: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: metricName(names, "request_running"), Help: "Requests between pick and end of response.",
		}, labels),
		seconds:       histogram(metricName(names, "request_duration_seconds"), "From the request's first byte to the response's end.", secs, labels...),
		ttft:          histogram(metricName(names, "request_ttft_seconds"), "From the request's first byte to the response's first.", secs, append(labels, "streaming")...),
		requestBytes:  histogram(metricName(names, "request_size_bytes"), "Size of request bodies.", bytes, labels...),
		responseBytes: histogram(metricName(names, "response_size_bytes"), "Size of response bodies.", bytes, labels...),
		inputTokens:   histogram(metricName(names, "request_input_tokens"), "Prompt tokens as the response's usage says.", tokens, labels...),
		outputTokens:  histogram(metricName(names, "request_output_tokens"), "Completion tokens as the response's usage says.", tokens, labels...),
		cachedTk:      histogram(metricName(names, "request_cached_tokens"), "Cached prompt tokens as the response's usage says.", tokens, labels...),
		decision: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "baton_director_decision_seconds", Help: "From the request's first byte to the answer, sub-requests included.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120},
		}),
		outcomes:  counter("baton_director_outcomes_total", "Answers by what came before decode: disaggregated, aggregated, fallback.", "outcome"),
		repicked:  plain("baton_director_decode_repicked_total", "Decode endpoints that vanished between pick and answer."),
		ejections: plain("baton_director_ejections_total", "Endpoints ejected after repeated failures, of responses or of sub-requests."),
	}
	for _, c := range []string{"disaggregated", "aggregated", "fallback"} {
		m.outcomes.WithLabelValues(c)
	}
	m.models.Store(&map[string]*series{})
	reg.MustRegister(m.requests, m.errors, m.running, m.seconds, m.ttft, m.requestBytes, m.responseBytes, m.inputTokens, m.outputTokens,
		m.cachedTk, m.decision, m.repicked, m.ejections, m.outcomes)
	return m
}

// of returns the series of a model, resolved at its first request.
func (m *metrics) of(model string) *series {
	if s := (*m.models.Load())[model]; s != nil {
		return s
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	old := *m.models.Load()
	if s := old[model]; s != nil {
		return s
	}
	if len(old) >= maxModels && model != otherModel {
		if s := old[otherModel]; s != nil {
			return s
		}
		model = otherModel
	}
	now := make(map[string]*series, len(old)+1)
	maps.Copy(now, old)
	s := m.resolve(model)
	now[model] = s
	m.models.Store(&now)
	return s
}

// otherModel is the label of model names over the cap.
const otherModel = "other"

func (m *metrics) resolve(model string) *series {
	model = printable(model)
	l := []string{model, model, "default-flow", "0"}
	return &series{
		requests: m.requests.WithLabelValues(l...), running: m.running.WithLabelValues(l...), seconds: m.seconds.WithLabelValues(l...),
		ttft: m.ttft.WithLabelValues(append(l, "false")...), ttftStream: m.ttft.WithLabelValues(append(l, "true")...),
		requestBytes: m.requestBytes.WithLabelValues(l...), responseBytes: m.responseBytes.WithLabelValues(l...),
		input: m.inputTokens.WithLabelValues(l...), output: m.outputTokens.WithLabelValues(l...), cached: m.cachedTk.WithLabelValues(l...),
	}
}

// printable bounds what a client can put into a label: 128 bytes of valid text.
func printable(s string) string {
	if len(s) > 128 {
		s = s[:128]
	}
	out := []rune(s)
	for i, r := range out {
		if r == '\uFFFD' || r < ' ' {
			out[i] = '_'
		}
	}
	return string(out)
}

func (m *metrics) began(req *inference.Request) {
	s := m.of(req.Model)
	s.requests.Inc()
	s.running.Inc()
	s.requestBytes.Observe(float64(req.Body.Len))
}

// refused counts a request that was answered with an error before it was counted as running.
func (m *metrics) refused(req *inference.Request, err error) {
	model := ""
	if req != nil {
		model = printable(req.Model)
	}
	if (*m.models.Load())[model] == nil {
		model = otherModel
	}
	m.errors.WithLabelValues(model, model, "default-flow", "0", errorCode(err)).Inc()
}

func (m *metrics) failed(req *inference.Request, err error) {
	if !errors.Is(err, context.Canceled) {
		m.refused(req, err)
	}
}

// errorCode is llm-d's name for the kind of error.
func errorCode(err error) string {
	switch {
	case errors.Is(err, inference.ErrMalformed), errors.Is(err, sidecar.ErrNotCarried):
		return "BadRequest"
	case errors.Is(err, scheduler.ErrNoCandidate):
		return "ServiceUnavailable"
	case errors.Is(err, admission.ErrOverBudget):
		return "ResourceExhausted"
	case errors.Is(err, sidecar.ErrBudgetSpent):
		return "DeadlineExceeded"
	default:
		return "Internal"
	}
}

func (m *metrics) ended(x *Exchange, now time.Time) {
	s := m.of(x.req.Model)
	s.running.Dec()
	if !x.answered {
		return
	}
	m.decision.Observe(x.decided.Seconds())
	switch name := x.outcome.Name; name {
	case "disaggregated", "aggregated":
		m.outcomes.WithLabelValues(name).Inc()
	default:
		m.outcomes.WithLabelValues("fallback").Inc()
	}
	s.seconds.Observe(now.Sub(x.start).Seconds())
	if !x.firstByte.IsZero() {
		ttft := s.ttft
		if x.req.Stream {
			ttft = s.ttftStream
		}
		ttft.Observe(x.firstByte.Sub(x.start).Seconds())
	}
	if x.respBytes > 0 {
		s.responseBytes.Observe(float64(x.respBytes))
	}
	if x.usage.Seen {
		s.input.Observe(float64(x.usage.PromptTokens))
		s.output.Observe(float64(x.usage.CompletionTokens))
		s.cached.Observe(float64(x.usage.CachedTokens))
	}
}
