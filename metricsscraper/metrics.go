// SPDX-License-Identifier: Apache-2.0

package metricsscraper

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics counts scrapes of all endpoints together.
type metrics struct {
	scrapes  prometheus.Counter
	errors   *prometheus.CounterVec
	duration prometheus.Histogram
	bytes    prometheus.Counter
}

// newMetrics registers the series. names is llm-d (or empty) or gie; stale counts endpoints with stale values.
func newMetrics(reg prometheus.Registerer, names string, stale func() float64) (*metrics, error) {
	prefix := "llm_d_epp_"
	switch names {
	case "", "llm-d":
	case "gie":
		prefix = "llm_d_inference_scheduler_"
	default:
		return nil, fmt.Errorf("metricsscraper: metrics names %q, must be llm-d or gie", names)
	}
	m := &metrics{
		scrapes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "baton_metricsscraper_scrapes_total", Help: "Scrapes of endpoints that brought values.",
		}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: prefix + "datalayer_poll_errors_total", Help: "Scrapes of endpoints that failed, by reason.",
			ConstLabels: prometheus.Labels{"source_type": "metrics-data-source"},
		}, []string{"reason"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "baton_metricsscraper_scrape_duration_seconds", Help: "Time from the request of a page to its last value.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5},
		}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "baton_metricsscraper_page_bytes_total", Help: "Bytes of metrics pages that were read.",
		}),
	}
	for _, r := range reasons() {
		m.errors.WithLabelValues(r)
	}
	staleGauge := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "baton_metricsscraper_stale_endpoints", Help: "Endpoints whose metrics were never scraped or are too old to be believed.",
	}, stale)
	for _, c := range []prometheus.Collector{m.scrapes, m.errors, m.duration, m.bytes, staleGauge} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}
