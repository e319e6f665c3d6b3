// SPDX-License-Identifier: Apache-2.0

// Package datastore knows which endpoints exist. A [Store] takes complete lists from a [Source] (a watched file, later
// Kubernetes), keeps each endpoint's state as long as it lives and publishes the pool as one immutable
// [pool.Snapshot] behind an atomic pointer. Floor 1: it imports pool and config.
package datastore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/pool"
)

// DefaultEngine is the engine of an endpoint whose labels name none (the engines' sources, mid-2026).
const DefaultEngine = pool.DefaultEngine

// Wanted is one endpoint that a source wants in the pool.
type Wanted struct {
	Namespace string
	Name      string
	// UID tells a restarted pod from the one before: state is kept while UID and port stay the same.
	UID    string
	Addr   netip.AddrPort
	Rank   int               // index of the port within the pod
	Labels map[string]string // not changed by anybody afterwards
	// Sidecar is what the source knows of the pod's containers; SidecarUnknown asks the label.
	Sidecar pool.Sidecar
}

// Source tells a Store which endpoints exist.
type Source interface {
	// Run calls publish with one complete list after another, never two at once, and returns when ctx ends (nil) or
	// when it cannot go on. The first list makes the Store synced; an empty one is a list too. publish keeps the slice.
	Run(ctx context.Context, publish func([]Wanted)) error
}

// Options of a Store.
type Options struct {
	Source Source // required
	// PoolName is the label name of the pool gauges.
	PoolName string
	// MetricsNames chooses the names of the pool gauges: llm-d (default) or gie (llm-d-router v0.10).
	MetricsNames string
	// OnChange is told every new snapshot, in order, from one goroutine; it should return soon.
	OnChange []func(*pool.Snapshot)
	// Forget is called for every endpoint that is gone, after the snapshot without it was published and OnChange
	// returned; its slot is given to nobody before Forget returned. May be nil.
	Forget     func(*pool.Endpoint)
	Logger     *slog.Logger          // required
	Registerer prometheus.Registerer // required
}

// Store publishes the pool. Safe for concurrent use.
type Store struct {
	opts     Options // immutable
	log      *slog.Logger
	metrics  *metrics
	snapshot atomic.Pointer[pool.Snapshot]

	mu    sync.Mutex
	known map[identity]*pool.Endpoint // guarded by mu
	slots slots                       // guarded by mu
}

// identity is what an endpoint's state hangs on.
type identity struct {
	uid  string
	port uint16
}

// New makes a Store with an empty pool that is not synced; Run fills it.
func New(opts Options) (*Store, error) {
	var errs []error
	if opts.Source == nil {
		errs = append(errs, errors.New("datastore: Source is required"))
	}
	if opts.Logger == nil {
		errs = append(errs, errors.New("datastore: Logger is required"))
	}
	if opts.Registerer == nil {
		errs = append(errs, errors.New("datastore: Registerer is required"))
	}
	opts.MetricsNames = cmp.Or(opts.MetricsNames, "llm-d")
	if _, ok := gaugeNames(opts.MetricsNames); !ok {
		errs = append(errs, fmt.Errorf("datastore: metrics names %q, must be llm-d or gie", opts.MetricsNames))
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	s := &Store{opts: opts, log: opts.Logger.With(slog.String("component", "datastore")), known: map[identity]*pool.Endpoint{}}
	s.snapshot.Store(pool.NewSnapshot(0, false, nil))
	var err error
	if s.metrics, err = newMetrics(opts.Registerer, s); err != nil {
		return nil, err
	}
	return s, nil
}

// Snapshot is the pool now; never nil, one atomic load.
func (s *Store) Snapshot() *pool.Snapshot { return s.snapshot.Load() }

// Synced reports whether the source has delivered its first complete list.
func (s *Store) Synced() bool { return s.Snapshot().Synced }

// Run runs the source until ctx ends, or until the source cannot go on.
func (s *Store) Run(ctx context.Context) error {
	if err := s.opts.Source.Run(ctx, s.publish); err != nil {
		return fmt.Errorf("endpoint source: %w", err)
	}
	return nil
}

// publish turns a list into the next snapshot.
func (s *Store) publish(wanted []Wanted) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.Snapshot()
	endpoints, known, gone := s.diffLocked(wanted)
	if old.Synced && slices.Equal(old.Endpoints, endpoints) {
		return
	}
	s.known = known
	next := pool.NewSnapshot(old.Generation+1, true, endpoints)
	s.snapshot.Store(next)
	s.metrics.changes.Inc()
	s.log.LogAttrs(context.Background(), slog.LevelInfo, "pool changed",
		slog.Int("endpoints", len(endpoints)), slog.Int("gone", len(gone)), slog.Uint64("generation", next.Generation))
	for _, tell := range s.opts.OnChange {
		tell(next)
	}
	for _, e := range gone {
		if s.opts.Forget != nil {
			s.opts.Forget(e)
		}
		s.slots.release(e.Slot)
	}
}

// diffLocked returns the endpoints of the next snapshot in the source's order and those that are gone. An endpoint
// about which nothing changed stays the same value.
func (s *Store) diffLocked(wanted []Wanted) (endpoints []*pool.Endpoint, known map[identity]*pool.Endpoint, gone []*pool.Endpoint) {
	known = make(map[identity]*pool.Endpoint, len(wanted))
	addrs := make(map[netip.AddrPort]bool, len(wanted))
	endpoints = make([]*pool.Endpoint, 0, len(wanted))
	for i := range wanted {
		w := &wanted[i]
		id := identity{w.UID, w.Addr.Port()}
		if known[id] != nil || addrs[w.Addr] {
			s.metrics.duplicates.Inc()
			s.log.LogAttrs(context.Background(), slog.LevelWarn, "endpoint left out: its address or identity is taken",
				slog.String("endpoint", w.Namespace+"/"+w.Name), slog.String("address", w.Addr.String()))
			continue
		}
		e := s.known[id]
		if e == nil {
			e = newEndpoint(w, &pool.State{Slot: s.slots.take(), Born: time.Now()})
		} else if changed := newEndpoint(w, e.State); !equal(e, changed) {
			e = changed
		}
		known[id], addrs[w.Addr] = e, true
		endpoints = append(endpoints, e)
	}
	for id, e := range s.known {
		if known[id] == nil {
			gone = append(gone, e)
		}
	}
	slices.SortFunc(gone, func(a, b *pool.Endpoint) int { return cmp.Compare(a.Slot, b.Slot) })
	return endpoints, known, gone
}

// newEndpoint reads role, sidecar and engine off the labels.
func newEndpoint(w *Wanted, state *pool.State) *pool.Endpoint {
	e := &pool.Endpoint{
		Namespace: w.Namespace,
		Name:      w.Name,
		UID:       w.UID,
		Addr:      w.Addr,
		Hostport:  w.Addr.String(),
		Rank:      w.Rank,
		Labels:    w.Labels,
		Role:      pool.ParseRole(w.Labels[pool.LabelRole]),
		Sidecar:   w.Sidecar,
		Engine:    cmp.Or(w.Labels[pool.LabelEngine], w.Labels[pool.LabelEngineGIE], DefaultEngine),

		TensorParallel: pool.ParseTensorParallel(w.Labels[pool.LabelTensorParallel]),
		State:          state,
	}
	if e.Sidecar == pool.SidecarUnknown {
		switch w.Labels[pool.LabelSidecar] {
		case "true":
			e.Sidecar = pool.SidecarPresent
		case "false":
			e.Sidecar = pool.SidecarAbsent
		}
	}
	return e
}

// equal compares what a source can change; role, engine, tensor parallel size and host:port follow from it.
func equal(a, b *pool.Endpoint) bool {
	return a.Namespace == b.Namespace && a.Name == b.Name && a.UID == b.UID && a.Addr == b.Addr && a.Rank == b.Rank &&
		a.Sidecar == b.Sidecar && maps.Equal(a.Labels, b.Labels)
}

// slots hands out the smallest free numbers.
type slots struct {
	next uint32
	free []uint32
}

func (s *slots) take() uint32 {
	if len(s.free) == 0 {
		s.next++
		return s.next - 1
	}
	at := slices.Index(s.free, slices.Min(s.free))
	slot := s.free[at]
	s.free = slices.Delete(s.free, at, at+1)
	return slot
}

func (s *slots) release(slot uint32) { s.free = append(s.free, slot) }
