// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Registry is the network of KV side channels: the engines of one process that can pull blocks from each other. Safe
// for concurrent use.
type Registry struct {
	mu      sync.Mutex
	engines []*Engine // nil where one was closed
	ports   int       // side-channel ports given out: one per rank
	pages   map[pageKey]*page

	encodings itemSet    // of encoderExample
	blocks    blockStore // of storage; has its own lock
}

// NewRegistry returns an empty registry.
func NewRegistry() *Registry { return &Registry{pages: map[pageKey]*page{}} }

// firstSidePort is VLLM_NIXL_SIDE_CHANNEL_PORT's default. Engines of one registry are told apart by it.
const firstSidePort = 5600

func (r *Registry) add(e *Engine, ranks int) (sidePort int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.engines = append(r.engines, e)
	r.ports += ranks
	return firstSidePort + r.ports - ranks
}

func (r *Registry) remove(e *Engine) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if i := slices.Index(r.engines, e); i >= 0 {
		r.engines[i] = nil
	}
}

// all returns the engines.
func (r *Registry) all() []*Engine {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(r.engines), func(e *Engine) bool { return e == nil })
}

// byID returns the living process with that engine id, nil when there is none.
func (r *Registry) byID(id string) *process {
	for _, e := range r.all() {
		if p := e.running(); p != nil {
			for _, q := range p.ranks {
				if q.id == id {
					return q
				}
			}
		}
	}
	return nil
}

// What a failed handshake costs before it fails, as measured on a real vLLM 0.32 (real time, before scaling).
const (
	waitWrongEngine = 40 * time.Millisecond
	waitWrongPort   = 5 * time.Second
	waitWrongHost   = 10 * time.Second
	waitGone        = 100 * time.Millisecond
)

// dial finds the process behind a side channel as from seen: a loopback name is from's own host. When there is none it
// says after how long a real engine gives up.
func (r *Registry) dial(from *process, host string, port int) (p *process, giveUp time.Duration) {
	ip, err := netip.ParseAddr(host)
	if host == "localhost" {
		ip, err = from.addr.Addr(), nil
	}
	if err != nil {
		return nil, waitWrongHost
	}
	known := false
	for _, e := range r.all() {
		if e.Addr().Addr() != ip {
			continue
		}
		known = true
		if p := e.running(); p != nil && port >= e.sidePort && port < e.sidePort+len(p.ranks) {
			return p.ranks[port-e.sidePort], 0
		}
	}
	if known {
		return nil, waitWrongPort
	}
	return nil, waitWrongHost
}

// page returns the shared static part of a /metrics page.
func (r *Registry) page(k pageKey) *page {
	r.mu.Lock()
	defer r.mu.Unlock()
	pg, ok := r.pages[k]
	if !ok {
		pg = newPage(k)
		r.pages[k] = pg
	}
	return pg
}
