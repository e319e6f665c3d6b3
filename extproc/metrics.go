// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics of the streams themselves.
type metrics struct {
	open       atomic.Int64
	lastRow    atomic.Pointer[string] // the visibility that the gauge shows
	streams    prometheus.Counter
	refusals   *prometheus.CounterVec
	ends       map[string]prometheus.Counter
	visible    map[string]prometheus.Gauge
	unexpected prometheus.Counter
	panics     prometheus.Counter
	cut        prometheus.Counter
	corrected  prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		streams: prometheus.NewCounter(prometheus.CounterOpts{Name: "baton_extproc_streams_total", Help: "ext_proc streams opened."}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "baton_extproc_refusals_total", Help: "Requests answered by the picker itself, by reason.",
		}, []string{"reason"}),
		unexpected: prometheus.NewCounter(prometheus.CounterOpts{Name: "baton_extproc_unexpected_messages_total", Help: "Messages that do not belong where they came."}),
		panics:     prometheus.NewCounter(prometheus.CounterOpts{Name: "baton_extproc_panics_total", Help: "Panics recovered in streams."}),
		cut:        prometheus.NewCounter(prometheus.CounterOpts{Name: "baton_extproc_streams_cut_total", Help: "Streams still open at the end of the drain time, which were cut."}),
		corrected:  prometheus.NewCounter(prometheus.CounterOpts{Name: "baton_extproc_usage_corrected_total", Help: "Responses whose count of cached tokens was overwritten by the prefill's."}),
		ends:       map[string]prometheus.Counter{}, visible: map[string]prometheus.Gauge{},
	}
	for i := range statuses {
		m.refusals.WithLabelValues(statuses[i].reason)
	}
	m.refusals.WithLabelValues(internal.reason)
	m.refusals.WithLabelValues(prefillFailed.reason)
	m.refusals.WithLabelValues(encodeFailed.reason)
	ends := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "baton_extproc_stream_ends_total", Help: "Answered streams by what the gateway let us see of the response's end: bodies, end, none.",
	}, []string{"visibility"})
	visible := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "baton_extproc_response_visibility", Help: "1 for what the gateway last let us see of a response's end: bodies, end, none.",
	}, []string{"visibility"})
	for _, v := range []string{"bodies", "end", "none"} {
		m.ends[v], m.visible[v] = ends.WithLabelValues(v), visible.WithLabelValues(v)
	}
	openGauge := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "baton_extproc_streams_open", Help: "ext_proc streams open now."},
		func() float64 { return float64(m.open.Load()) })
	reg.MustRegister(m.streams, m.cut, m.corrected, m.refusals, m.unexpected, m.panics, ends, visible, openGauge)
	return m
}

func (m *metrics) opened() {
	m.open.Add(1)
	m.streams.Inc()
}

func (m *metrics) closed() { m.open.Add(-1) }

func (m *metrics) refused(reason string) { m.refusals.WithLabelValues(reason).Inc() }

// visibility counts one end and marks the row the gateway is in.
func (m *metrics) visibility(row string) {
	m.ends[row].Inc()
	if last := m.lastRow.Load(); last != nil && *last == row {
		return
	}
	m.lastRow.Store(&row)
	for name, g := range m.visible {
		if name == row {
			g.Set(1)
		} else {
			g.Set(0)
		}
	}
}
