// SPDX-License-Identifier: Apache-2.0

// Package pooltest builds endpoints and snapshots for tests and benchmarks: short chains instead of struct literals.
// What is not said is the usual case: an old endpoint, no labels, metrics fresh for ever with nothing waiting.
package pooltest

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/baton-epp/baton/pool"
)

// Builder makes one endpoint. Its methods change and return it.
type Builder struct {
	e     pool.Endpoint
	born  time.Time
	m     pool.Metrics
	never bool
	work  []int64
}

// E starts an endpoint called name.
func E(name string) *Builder {
	return &Builder{
		e:    pool.Endpoint{Namespace: "default", Name: name, UID: "uid-" + name, Engine: "vllm", Labels: map[string]string{}},
		born: time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC),
		m: pool.Metrics{
			Begun:      time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC),
			FreshUntil: time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC),
			Has:        pool.HasWaiting | pool.HasRunning | pool.HasKVCacheUsage,
		},
	}
}

// Addr sets ip:port; without it [Snapshot] numbers the endpoints 192.168.1.1:8000, 192.168.1.2:8000 and so on.
func (b *Builder) Addr(hostport string) *Builder {
	b.e.Addr = netip.MustParseAddrPort(hostport)
	return b
}

// Role sets the role label and the role.
func (b *Builder) Role(value string) *Builder { return b.Label(pool.LabelRole, value) }

// Label sets one label; the labels of role, engine and tensor parallel size set those too.
func (b *Builder) Label(key, value string) *Builder {
	b.e.Labels[key] = value
	switch key {
	case pool.LabelRole:
		b.e.Role = pool.ParseRole(value)
	case pool.LabelEngine, pool.LabelEngineGIE:
		b.e.Engine = value
	case pool.LabelTensorParallel:
		b.e.TensorParallel = pool.ParseTensorParallel(value)
	}
	return b
}

// Rank sets the data-parallel rank.
func (b *Builder) Rank(n int) *Builder { b.e.Rank = n; return b }

// Waiting sets the queue depth.
func (b *Builder) Waiting(n float64) *Builder { b.m.Waiting = n; return b }

// Running sets the number of requests in the batch.
func (b *Builder) Running(n float64) *Builder { b.m.Running = n; return b }

// KV sets the KV cache usage, a fraction 0–1.
func (b *Builder) KV(usage float64) *Builder { b.m.KVCacheUsage = usage; return b }

// LoRA sets the adapter limit and the loaded adapters.
func (b *Builder) LoRA(limit int, running ...string) *Builder {
	b.m.Has |= pool.HasLoRA
	b.m.MaxLoRA, b.m.RunningLoRA = limit, running
	return b
}

// WaitingLoRA sets the adapters that requests wait for.
func (b *Builder) WaitingLoRA(names ...string) *Builder { b.m.WaitingLoRA = names; return b }

// Cache sets the engine's block size in tokens and its number of KV blocks.
func (b *Builder) Cache(blockSize, blocks int) *Builder {
	b.m.Has |= pool.HasCacheConfig
	b.m.BlockSize, b.m.NumBlocks = blockSize, blocks
	return b
}

// Sleeping puts the engine to sleep.
func (b *Builder) Sleeping() *Builder {
	b.m.Has |= pool.HasSleep
	b.m.Sleeping = true
	return b
}

// Stale keeps the values but makes them too old to believe.
func (b *Builder) Stale() *Builder { b.m.FreshUntil = b.m.Begun; return b }

// Unscraped leaves the endpoint without any metrics.
func (b *Builder) Unscraped() *Builder { b.never = true; return b }

// Born sets when the endpoint was first seen.
func (b *Builder) Born(t time.Time) *Builder { b.born = t; return b }

// InFlight reserves one request of each of the given numbers of tokens, before the scrape.
func (b *Builder) InFlight(tokens ...int64) *Builder { b.work = tokens; return b }

// Build makes the endpoint with the given slot.
func (b *Builder) Build(slot uint32) *pool.Endpoint {
	e := b.e
	if !e.Addr.IsValid() {
		n := slot + 1
		e.Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, 1 + byte(n>>8), byte(n)}), 8000) //nolint:gosec // at most 65,000
	}
	e.Hostport = e.Addr.String()
	e.State = &pool.State{Slot: slot, Born: b.born}
	for _, tokens := range b.work {
		e.Load.Reserve(tokens)
	}
	if !b.never {
		m := b.m
		m.Started = e.Load.Started()
		e.SetMetrics(&m)
	}
	return &e
}

// Snapshot builds the endpoints, slots in order, as one synced snapshot.
func Snapshot(builders ...*Builder) *pool.Snapshot {
	endpoints := make([]*pool.Endpoint, len(builders))
	for i, b := range builders {
		endpoints[i] = b.Build(uint32(i))
	}
	return pool.NewSnapshot(1, true, endpoints)
}

// Idle is a snapshot of n idle endpoints called p0, p1 and so on.
func Idle(n int) *pool.Snapshot {
	builders := make([]*Builder, n)
	for i := range builders {
		builders[i] = E(fmt.Sprintf("p%d", i))
	}
	return Snapshot(builders...)
}

// Names lists the endpoints' names, separated by spaces.
func Names(endpoints ...*pool.Endpoint) string {
	names := make([]string, len(endpoints))
	for i, e := range endpoints {
		names[i] = e.Name
	}
	return strings.Join(names, " ")
}
