// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"fmt"
	"math"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/pool"
)

// metrics counts what happens to the pool and shows the pool itself.
type metrics struct {
	changes    prometheus.Counter
	duplicates prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, s *Store) (*metrics, error) {
	m := &metrics{
		changes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "baton_datastore_changes_total", Help: "Snapshots of the pool that were published.",
		}),
		duplicates: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "baton_datastore_duplicate_endpoints_total", Help: "Endpoints left out because their address or identity was taken.",
		}),
	}
	return m, register(reg, m.changes, m.duplicates, newPoolGauges(s))
}

func register(reg prometheus.Registerer, collectors ...prometheus.Collector) error {
	for _, c := range collectors {
		if err := reg.Register(c); err != nil {
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	return nil
}

// names of the pool gauges as dashboards know them; empty = not there.
type names struct {
	ready, kvUsage, queue, running           string
	kvUsageStdDev, queueStdDev, runStdDev    string
	endpointQueue, endpointQueueEndpointName string
}

// gaugeNames are those of llm-d-router v0.10 and of GIE v1.5 (gie).
func gaugeNames(dialect string) (names, bool) {
	switch dialect {
	case "llm-d":
		const p = "llm_d_epp_"
		return names{
			ready: p + "ready_endpoints", kvUsage: p + "average_kv_cache_utilization", queue: p + "average_queue_size",
			running: p + "average_running_requests", kvUsageStdDev: p + "std_dev_kv_cache_utilization",
			queueStdDev: p + "std_dev_queue_size", runStdDev: p + "std_dev_running_requests",
			endpointQueue: p + "per_endpoint_queue_size", endpointQueueEndpointName: "model_server_endpoint",
		}, true
	case "gie":
		const p = "inference_pool_"
		return names{
			ready: p + "ready_pods", kvUsage: p + "average_kv_cache_utilization", queue: p + "average_queue_size",
			running: p + "average_running_requests", endpointQueue: p + "per_pod_queue_size", endpointQueueEndpointName: "model_server_pod",
		}, true
	default:
		return names{}, false
	}
}

// poolGauges reads the snapshot when it is collected, so that nothing is kept up to date for nobody.
type poolGauges struct {
	store                                 *Store
	ready, kvUsage, queue, running        *prometheus.Desc
	kvUsageStdDev, queueStdDev, runStdDev *prometheus.Desc // nil = not there
	endpointQueue                         *prometheus.Desc
}

func newPoolGauges(s *Store) *poolGauges {
	n, _ := gaugeNames(s.opts.MetricsNames)
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		if name == "" {
			return nil
		}
		return prometheus.NewDesc(name, help, labels, prometheus.Labels{"name": s.opts.PoolName})
	}
	return &poolGauges{
		store:         s,
		ready:         desc(n.ready, "Endpoints of the pool that answer."),
		kvUsage:       desc(n.kvUsage, "Mean KV cache usage of the endpoints whose value is fresh, 0 to 1."),
		queue:         desc(n.queue, "Mean number of waiting requests of the endpoints whose value is fresh."),
		running:       desc(n.running, "Mean number of running requests of the endpoints whose value is fresh."),
		kvUsageStdDev: desc(n.kvUsageStdDev, "Standard deviation of the KV cache usage."),
		queueStdDev:   desc(n.queueStdDev, "Standard deviation of the number of waiting requests."),
		runStdDev:     desc(n.runStdDev, "Standard deviation of the number of running requests."),
		endpointQueue: desc(n.endpointQueue, "Waiting requests of one endpoint, when fresh.", n.endpointQueueEndpointName),
	}
}

// Describe implements prometheus.Collector.
func (g *poolGauges) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{g.ready, g.kvUsage, g.queue, g.running, g.kvUsageStdDev, g.queueStdDev, g.runStdDev, g.endpointQueue} {
		if d != nil {
			ch <- d
		}
	}
}

// Collect implements prometheus.Collector.
func (g *poolGauges) Collect(ch chan<- prometheus.Metric) {
	now := time.Now()
	var ready float64
	var kvUsage, queue, running moments
	for _, e := range g.store.Snapshot().Endpoints {
		if e.Health.Standing(now) != pool.NotReady {
			ready++
		}
		m := e.Metrics()
		if !m.Fresh(now) {
			continue
		}
		if m.Has&pool.HasKVCacheUsage != 0 {
			kvUsage.add(m.KVCacheUsage)
		}
		if m.Has&pool.HasRunning != 0 {
			running.add(m.Running)
		}
		if m.Has&pool.HasWaiting != 0 {
			queue.add(m.Waiting)
			ch <- prometheus.MustNewConstMetric(g.endpointQueue, prometheus.GaugeValue, m.Waiting, e.ID())
		}
	}
	ch <- prometheus.MustNewConstMetric(g.ready, prometheus.GaugeValue, ready)
	for _, row := range []struct {
		mean, stdDev *prometheus.Desc
		of           moments
	}{{g.kvUsage, g.kvUsageStdDev, kvUsage}, {g.queue, g.queueStdDev, queue}, {g.running, g.runStdDev, running}} {
		mean, stdDev := row.of.result()
		ch <- prometheus.MustNewConstMetric(row.mean, prometheus.GaugeValue, mean)
		if row.stdDev != nil {
			ch <- prometheus.MustNewConstMetric(row.stdDev, prometheus.GaugeValue, stdDev)
		}
	}
}

// moments sums what mean and standard deviation need.
type moments struct{ n, sum, squares float64 }

func (m *moments) add(x float64) {
	m.n++
	m.sum += x
	m.squares += x * x
}

// result is mean and standard deviation (of the population), 0 when nothing was added.
func (m *moments) result() (mean, stdDev float64) {
	if m.n == 0 {
		return 0, 0
	}
	mean = m.sum / m.n
	return mean, math.Sqrt(max(0, m.squares/m.n-mean*mean))
}
