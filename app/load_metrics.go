// SPDX-License-Identifier: Apache-2.0

package app

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/pool"
)

// loadMetrics shows what this picker knows of each endpoint beside what was scraped, computed when somebody scrapes.
// Endpoint labels appear on pool gauges only. Safe for concurrent use.
type loadMetrics struct {
	snapshot func() *pool.Snapshot
	held     func() int64

	requests, tokens, standing, expired, heldBytes *prometheus.Desc
}

func newLoadMetrics(snapshot func() *pool.Snapshot, held func() int64) *loadMetrics {
	d := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	return &loadMetrics{
		snapshot: snapshot, held: held,
		requests:  d("llm_d_epp_inflight_requests", "Requests sent to an endpoint and not known to have ended.", "endpoint_name", "namespace"),
		tokens:    d("llm_d_epp_inflight_tokens", "Prompt tokens sent to an endpoint and not known to be computed.", "endpoint_name", "namespace"),
		standing:  d("baton_pool_endpoint_standing", "1 for what requests have shown of an endpoint: healthy, probation, ejected, not-ready.", "endpoint_name", "namespace", "standing"),
		expired:   d("baton_pool_kv_expired_requests_total", "Prefills whose KV blocks an endpoint gave up after the lease (vllm:nixl_num_kv_expired_reqs_total).", "endpoint_name", "namespace"),
		heldBytes: d("baton_admission_held_bytes", "Body bytes of all requests being held."),
	}
}

// Describe implements prometheus.Collector.
func (l *loadMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{l.requests, l.tokens, l.standing, l.expired, l.heldBytes} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (l *loadMetrics) Collect(ch chan<- prometheus.Metric) {
	now := time.Now()
	for _, e := range l.snapshot().Endpoints {
		name := e.ID()
		ch <- prometheus.MustNewConstMetric(l.requests, prometheus.GaugeValue, float64(e.Load.Requests()), name, e.Namespace)
		ch <- prometheus.MustNewConstMetric(l.tokens, prometheus.GaugeValue, float64(e.Load.Tokens()), name, e.Namespace)
		ch <- prometheus.MustNewConstMetric(l.standing, prometheus.GaugeValue, 1, name, e.Namespace, e.Health.Standing(now).String())
		if m := e.Metrics(); m.Has&pool.HasKVExpired != 0 {
			ch <- prometheus.MustNewConstMetric(l.expired, prometheus.CounterValue, m.KVExpired, name, e.Namespace)
		}
	}
	ch <- prometheus.MustNewConstMetric(l.heldBytes, prometheus.GaugeValue, float64(l.held()))
}
