// SPDX-License-Identifier: Apache-2.0

// Package pool holds the plain values that describe an InferencePool: which endpoints exist ([Endpoint]),
// what they last said of themselves ([Metrics]), what was sent to them since ([Load]) and whether they can be
// trusted with more ([Health]). Floor 0: it imports nothing of ours, starts nothing and waits for nothing.
//
// An [Endpoint] is immutable; what changes lives behind its [State], which survives a new [Snapshot] as long as
// the pod's UID and port stay the same.
package pool

import (
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"
)

// LabelRole is the pod label that says which phases an endpoint serves (llm-d's name).
const LabelRole = "llm-d.ai/role"

// LabelSidecar tells, with file discovery, whether a decode endpoint runs a P/D sidecar: "true", "false", or absent
// for not known.
const LabelSidecar = "baton-epp/sidecar"

// Labels that name the engine of an endpoint; the first one present wins.
const (
	LabelEngine    = "llm-d.ai/engine-type"
	LabelEngineGIE = "inference.networking.k8s.io/engine-type"
)

// DefaultEngine is the engine of an endpoint that does not name one.
const DefaultEngine = "vllm"

// LabelTensorParallel says over how many GPUs an endpoint's engine splits each layer, a number from 1 on.
const LabelTensorParallel = "baton-epp/tensor-parallel-size"

// ParseTensorParallel reads a value of [LabelTensorParallel]; 0 = not known, for what is no such number, too.
func ParseTensorParallel(value string) int {
	if n, err := strconv.ParseUint(value, 10, 16); err == nil {
		return int(n)
	}
	return 0
}

// Role is the set of phases an endpoint may serve, from [LabelRole]. The zero Role means that the label is absent.
type Role uint8

// The bits of a [Role].
const (
	RoleEncode Role = 1 << iota
	RolePrefill
	RoleDecode
	// RoleOther marks a label value that nobody defined: the endpoint serves no phase.
	RoleOther
)

// ParseRole reads a value of [LabelRole]: encode, encode-prefill, prefill, prefill-decode, both, decode or
// encode-prefill-decode. An empty value is the zero Role, any other is [RoleOther].
func ParseRole(value string) Role {
	switch value {
	case "":
		return 0
	case "encode":
		return RoleEncode
	case "encode-prefill":
		return RoleEncode | RolePrefill
	case "prefill":
		return RolePrefill
	case "prefill-decode", "both":
		return RolePrefill | RoleDecode
	case "decode":
		return RoleDecode
	case "encode-prefill-decode":
		return RoleEncode | RolePrefill | RoleDecode
	default:
		return RoleOther
	}
}

// Has reports whether r contains every bit of want.
func (r Role) Has(want Role) bool { return r&want == want }

// Sidecar says whether a decode endpoint is known to run a P/D sidecar.
type Sidecar uint8

// The states of [Sidecar].
const (
	SidecarUnknown Sidecar = iota
	SidecarPresent
	SidecarAbsent
)

// Endpoint is one address:port that serves a model; a pod with two ranks is two endpoints.
// Immutable: a change of labels makes a new Endpoint around the same State.
type Endpoint struct {
	Namespace string // Kubernetes namespace, "default" for files
	Name      string // pod name, or the name in the file
	UID       string // pod UID; a restarted pod has a new one. With files: name and address
	Addr      netip.AddrPort
	Hostport  string // Addr as text, IPv6 bracketed; computed once because every request needs it
	Rank      int    // index of the port within the pod, the data-parallel rank
	Labels    map[string]string
	Role      Role
	Sidecar   Sidecar
	Engine    string // vllm (default), sglang, trtllm-serve, triton-tensorrt-llm
	// TensorParallel is the value of [LabelTensorParallel]; 0 = not known.
	TensorParallel int
	*State
}

// ID is namespace/name, with -rank-N behind it for ranks above 0.
func (e *Endpoint) ID() string {
	id := e.Namespace + "/" + e.Name
	if e.Rank > 0 {
		id += "-rank-" + strconv.Itoa(e.Rank)
	}
	return id
}

// State is what changes about an endpoint while it lives. Safe for concurrent use.
type State struct {
	// Slot is a small number that no other living endpoint has; it is reused only after the prefix index has
	// forgotten the endpoint. Immutable.
	Slot uint32
	// Born is when the endpoint was first seen. Immutable.
	Born time.Time

	metrics atomic.Pointer[Metrics] // written by that endpoint's scrape loop only
	Load    Load
	Health  Health
	Pace    Pace
	Warm    Warm // the prefill endpoints that this one, decoding, has fetched from
}

// Metrics returns the last scraped values; never nil, the zero Metrics when nothing was scraped yet.
func (s *State) Metrics() *Metrics {
	if m := s.metrics.Load(); m != nil {
		return m
	}
	return &noMetrics
}

// SetMetrics publishes m, which must not change afterwards. Called by the endpoint's scrape loop only.
func (s *State) SetMetrics(m *Metrics) { s.metrics.Store(m) }

var noMetrics Metrics

// Has* say which values a scraped page carried; a missing family is unknown, not zero.
const (
	HasWaiting uint16 = 1 << iota
	HasRunning
	HasKVCacheUsage
	HasCacheConfig
	HasLoRA
	HasSleep
	HasKVExpired
	HasWaitingByReason
)

// Metrics is one scrape of one endpoint: plain values, immutable once published.
type Metrics struct {
	Begun      time.Time // when the scrape began: later reservations are not in these numbers
	FreshUntil time.Time // after this the values are stale (scrape interval plus --metrics-staleness-threshold)
	Started    int64     // Load.Settled when the scrape began
	Has        uint16    // Has* bits

	Waiting         float64 // queue depth: vllm:num_requests_waiting, summed over engines
	WaitingCapacity float64 // vllm:num_requests_waiting_by_reason{reason="capacity"}
	Running         float64 // requests in the batch: vllm:num_requests_running, summed
	KVCacheUsage    float64 // fraction 0–1: vllm:kv_cache_usage_perc, averaged
	KVExpired       float64 // vllm:nixl_num_kv_expired_reqs_total, summed
	BlockSize       int     // tokens in a KV block, from vllm:cache_config_info
	NumBlocks       int     // KV blocks of the engine, from vllm:cache_config_info
	MaxLoRA         int     // vllm:lora_requests_info{max_lora}
	RunningLoRA     []string
	WaitingLoRA     []string
	Sleeping        bool // vllm:engine_sleep_state other than awake
}

// Fresh reports whether the values were ever scraped and are young enough at now to be believed.
func (m *Metrics) Fresh(now time.Time) bool { return m.Has != 0 && now.Before(m.FreshUntil) }

// Snapshot is the pool at one moment: shared and read-only.
type Snapshot struct {
	Generation uint64
	Synced     bool // the source has delivered its first complete list
	Endpoints  []*Endpoint
	byAddr     map[netip.AddrPort]*Endpoint
}

// NewSnapshot indexes endpoints by address; it keeps the slice.
func NewSnapshot(generation uint64, synced bool, endpoints []*Endpoint) *Snapshot {
	s := &Snapshot{Generation: generation, Synced: synced, Endpoints: endpoints, byAddr: make(map[netip.AddrPort]*Endpoint, len(endpoints))}
	for _, e := range endpoints {
		s.byAddr[e.Addr] = e
	}
	return s
}

// ByAddr returns the endpoint at addr, or nil.
func (s *Snapshot) ByAddr(addr netip.AddrPort) *Endpoint { return s.byAddr[addr] }
