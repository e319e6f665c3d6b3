// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/pool"
)

// lists is a source that publishes what it is sent.
type lists struct {
	ch  chan []Wanted
	err error
}

func (l *lists) Run(ctx context.Context, publish func([]Wanted)) error {
	for {
		select {
		case <-ctx.Done():
			return l.err
		case w := <-l.ch:
			publish(w)
		}
	}
}

func pod(name, uid, addr string, labels map[string]string) Wanted {
	return Wanted{Namespace: "ns", Name: name, UID: uid, Addr: netip.MustParseAddrPort(addr), Labels: labels}
}

// newStore makes a store to which tests publish directly.
func newStore(t *testing.T, opts Options) (*Store, *prometheus.Registry) {
	t.Helper()
	reg := prometheus.NewRegistry()
	opts.Source, opts.Logger, opts.Registerer, opts.PoolName = &lists{}, slog.New(slog.DiscardHandler), reg, "p"
	s, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	return s, reg
}

func TestStateFollowsUID(t *testing.T) {
	var told []uint64
	var forgotten []string
	var s *Store
	s, _ = newStore(t, Options{
		OnChange: []func(*pool.Snapshot){func(sn *pool.Snapshot) { told = append(told, sn.Generation) }},
		Forget: func(e *pool.Endpoint) {
			forgotten = append(forgotten, fmt.Sprintf("%s slot %d", e.Name, e.Slot))
			if s.Snapshot().ByAddr(e.Addr) != nil && s.Snapshot().ByAddr(e.Addr).UID == e.UID {
				t.Error("forgotten while still in the snapshot")
			}
			if len(s.slots.free) > 0 && slices.Contains(s.slots.free, e.Slot) {
				t.Error("slot free before Forget returned")
			}
		},
	})
	if s.Snapshot() == nil || s.Synced() {
		t.Fatal("a new store has an empty snapshot that is not synced")
	}
	s.publish([]Wanted{pod("a", "1", "10.0.0.1:8000", nil), pod("b", "2", "10.0.0.2:8000", nil)})
	first := s.Snapshot()
	a, b := first.Endpoints[0], first.Endpoints[1]
	if !s.Synced() || a.Slot != 0 || b.Slot != 1 || a.Engine != "vllm" {
		t.Fatalf("first list: %+v %+v", a, b)
	}
	// The same list again changes nothing.
	s.publish([]Wanted{pod("a", "1", "10.0.0.1:8000", nil), pod("b", "2", "10.0.0.2:8000", nil)})
	if s.Snapshot() != first {
		t.Error("a list without news made a new snapshot")
	}
	// New labels: a new endpoint around the same state; a restarted pod: a new state in a slot of its own.
	s.publish([]Wanted{
		pod("a", "1", "10.0.0.1:8000", map[string]string{pool.LabelRole: "decode", pool.LabelSidecar: "true", pool.LabelEngineGIE: "sglang", pool.LabelTensorParallel: "4"}),
		pod("b", "3", "10.0.0.2:8000", nil),
	})
	a2, b2 := s.Snapshot().Endpoints[0], s.Snapshot().Endpoints[1]
	if a2 == a || a2.State != a.State || a2.Role != pool.RoleDecode || a2.Sidecar != pool.SidecarPresent || a2.Engine != "sglang" || a2.TensorParallel != 4 || a.TensorParallel != 0 {
		t.Errorf("relabelled: %+v", a2)
	}
	if b2.State == b.State || b2.Slot != 2 {
		t.Errorf("restarted: %+v", b2)
	}
	// b's old slot is free now; the address moved from a pod to another.
	s.publish([]Wanted{pod("c", "4", "10.0.0.1:8000", nil)})
	if c := s.Snapshot().Endpoints[0]; c.Slot != 1 {
		t.Errorf("slot %d, want the free 1", c.Slot)
	}
	s.publish(nil)
	if !s.Synced() || len(s.Snapshot().Endpoints) != 0 {
		t.Error("an empty list is a list")
	}
	if diff := cmp.Diff([]uint64{1, 2, 3, 4}, told); diff != "" {
		t.Errorf("told generations (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"b slot 1", "a slot 0", "b slot 2", "c slot 1"}, forgotten); diff != "" {
		t.Errorf("forgotten (-want +got):\n%s", diff)
	}
}

func TestDuplicatesAreLeftOut(t *testing.T) {
	s, reg := newStore(t, Options{})
	s.publish([]Wanted{
		pod("a", "1", "10.0.0.1:8000", nil),
		pod("a", "1", "10.0.0.1:8001", nil), // another rank
		pod("b", "2", "10.0.0.1:8000", nil), // address taken
		pod("c", "1", "10.0.0.9:8000", nil), // identity taken
	})
	if n := len(s.Snapshot().Endpoints); n != 2 {
		t.Errorf("%d endpoints, want 2", n)
	}
	if got := gather(t, reg)["baton_datastore_duplicate_endpoints_total"]; got != 2 {
		t.Errorf("duplicates %v, want 2", got)
	}
}

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &lists{ch: make(chan []Wanted)}
		s, err := New(Options{Source: source, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		source.ch <- []Wanted{pod("a", "1", "10.0.0.1:8000", nil)}
		synctest.Wait()
		if e := s.Snapshot().Endpoints; len(e) != 1 || !e[0].Born.Equal(time.Now()) {
			t.Errorf("endpoints %+v", e)
		}
		source.err = errors.New("broken")
		cancel()
		if err := <-done; err == nil || err.Error() != "endpoint source: broken" {
			t.Errorf("run: %v", err)
		}
	})
}

func TestNewNamesEveryProblem(t *testing.T) {
	_, err := New(Options{MetricsNames: "x"})
	want := "datastore: Source is required\ndatastore: Logger is required\ndatastore: Registerer is required\ndatastore: metrics names \"x\", must be llm-d or gie"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// gather reads every sample as name or name{value of the last label}.
func gather(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			if l := m.GetLabel(); len(l) > 0 && l[0].GetName() != "name" {
				name += "{" + l[0].GetValue() + "}"
			}
			out[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return out
}

func TestPoolGauges(t *testing.T) {
	s, reg := newStore(t, Options{})
	s.publish([]Wanted{
		pod("a", "1", "10.0.0.1:8000", nil), pod("b", "2", "10.0.0.2:8000", nil),
		pod("stale", "3", "10.0.0.3:8000", nil), pod("down", "4", "10.0.0.4:8000", nil),
	})
	fresh := time.Now().Add(time.Hour)
	has := pool.HasWaiting | pool.HasRunning | pool.HasKVCacheUsage
	e := s.Snapshot().Endpoints
	e[0].SetMetrics(&pool.Metrics{Has: has, FreshUntil: fresh, Waiting: 2, Running: 4, KVCacheUsage: 0.5})
	e[1].SetMetrics(&pool.Metrics{Has: has, FreshUntil: fresh, Waiting: 4, Running: 0, KVCacheUsage: 0.1})
	e[2].SetMetrics(&pool.Metrics{Has: has, Waiting: 100})
	e[3].Health.SetReady(false)
	got := gather(t, reg)
	for name, want := range map[string]float64{
		"llm_d_epp_ready_endpoints":                 3,
		"llm_d_epp_average_queue_size":              3,
		"llm_d_epp_average_running_requests":        2,
		"llm_d_epp_average_kv_cache_utilization":    0.3,
		"llm_d_epp_std_dev_queue_size":              1,
		"llm_d_epp_std_dev_running_requests":        2,
		"llm_d_epp_std_dev_kv_cache_utilization":    0.2,
		"llm_d_epp_per_endpoint_queue_size{ns/a}":   2,
		"llm_d_epp_per_endpoint_queue_size{ns/b}":   4,
		"baton_datastore_changes_total":             1,
		"baton_datastore_duplicate_endpoints_total": 0,
	} {
		if value, ok := got[name]; !ok || math.Abs(value-want) > 1e-9 {
			t.Errorf("%s = %v, want %v", name, value, want)
		}
		delete(got, name)
	}
	if len(got) > 0 {
		t.Errorf("more than expected: %v", got)
	}
	_, gie := newStore(t, Options{MetricsNames: "gie"})
	if ready, ok := gather(t, gie)["inference_pool_ready_pods"]; !ok || ready != 0 {
		t.Error("gie names")
	}
}
