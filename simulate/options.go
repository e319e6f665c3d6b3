// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Options say what one engine is. The zero value is a fast idle vLLM 0.32 on a free port. Durations: zero means the
// default, a negative one means none, and each is multiplied by Scale.
type Options struct {
	// Identity.
	Name string // default "engine"
	// Role is "prefill", "decode", "prefill-decode", "encode", "encode-prefill", "encode-prefill-decode" or "". A label:
	// any engine plays both KV roles, but SGLang's is its disaggregation mode. And "encode" does nothing else, and every
	// role with it encodes for others too.
	Role       string
	Addr       string // ip:port to listen on; default 127.0.0.1:0
	Model      string // served model name; default "tiny"
	Generation string // "" is vLLM 0.32; "old" has flat block ids, no handle after a stop finish, old metric names
	Seed       uint64 // seeds ids and fault draws; 0 draws a seed
	Engine     string // "" or "vllm", "sglang", "trtllm"
	Connector  string // how KV moves: for vLLM "" or "nixlv2" (pull), "nixl-push", "moriio" (READ), "mooncake", "offloading", "shared-storage", "lmcache-pd"; see wires.go
	Ranks      int    // data-parallel ranks behind the one address, each with its own blocks, queue and id; 1 to 8, default 1
	SidePort   int    // of the connector's own HTTP server, such as Mooncake's bootstrap server; 0 takes a free port

	// Capacity.
	BlockSize    int    // tokens per KV block; default 16 (vLLM on CPU: 32)
	NumBlocks    int    // KV blocks, one of them the null block; default 4096
	KVCacheDtype string // SGLang's --kv-cache-dtype; engines of different ones do not connect; default "auto"
	MaxNumSeqs   int    // sequences that run at once; default 256
	MaxWaiting   int    // sequences that may wait; more are answered 503; 0 is no limit
	MaxModelLen  int    // tokens of prompt and answer; default what the blocks hold, 131072 at most

	// Time, real before scaling.
	Scale            float64       // multiplies every duration; default 1
	PrefillFixed     time.Duration // per prefill; default 5ms
	PrefillPerToken  time.Duration // per prompt token that no cache had; default 20µs
	TransferFixed    time.Duration // per KV pull; default 2ms
	TransferPerToken time.Duration // per token pulled; default 1µs
	InterToken       time.Duration // between two tokens of an idle engine; default 5ms
	LoadStretch      float64       // a full batch is slower by 1+LoadStretch; default 1, negative is none
	Encode           time.Duration // per image or other media item, on whoever encodes it; default 20ms
	Handshake        time.Duration // first contact of a decode engine with a prefill engine; default 50ms (real pairs: up to 5s)
	Lease            time.Duration // how long finished prefills stay pinned; default the connector's, for NIXL 30s (kv_lease_duration), 480s in the old generation
	KeepAlive        time.Duration // idle connections are closed after it; default 5s as uvicorn, 1s at least however small Scale is

	// KV transfer.
	LoadFailurePolicy  string    // "fail" (default): a failed pull is a 500; "recompute": prefill locally
	RemoteHost         string    // what handles carry; default the engine's address; "localhost" as misconfigured operators have it
	MixRanks           bool      // read a handle whose port is another rank's, as engines without rank checks do: wrong text
	HashSeed           string    // PYTHONHASHSEED: root of the hashes in KV events, default vLLM 0.32's own; peers of the offloading connector need the same
	CachedNotParked    bool      // offloading: a prefill whose prefix was cached parks nothing, as vLLM 0.27 did
	TPSize             int       // tensor-parallel size in handles; a decode engine dies of a larger one than its own; default 1
	DuplicateRoomKills bool      // SGLang: a room that is in use ends the process, as in older versions; else it is a 500
	Peers              *Registry // engines of this process that can pull from each other; nil makes a registry of one

	// Media.
	Encoder string // how encoded media reaches other engines: "" (not at all), "ec-example" (a shared store), "ec-nixl" (handles)

	// Wire.
	LoRAs            []string // adapters served beside Model
	MaxLoRAs         int      // adapters that run at once; more wait as deferred; default 1 where LoRAs are
	RequestIDHeader  bool     // echo x-request-id (--enable-request-id-headers)
	ScaleOut         bool     // answer /inference/v1/generate and the render routes (--enable-scale-out)
	Embeddings       bool     // answer /v1/embeddings, as embedding models do
	HidePromptDetail bool     // usage.prompt_tokens_details null (without --enable-prompt-tokens-details)
	MetricsPage      MetricsPage
	KVEvents         KVEvents // what is told about the prefix cache

	// Testing.
	Faults       Faults
	RecordBodies int          // requests kept for [Engine.Bodies]; default 256, negative keeps none
	RecordBytes  int          // bytes of bodies kept; default 4 MiB; the last body is always kept
	Logger       *slog.Logger // nil discards
}

// MetricsPage shapes /metrics.
type MetricsPage struct {
	Padding int  // bytes of further histogram families at the end of the page
	IdleNaN bool // gauges of an idle engine are NaN
}

// timing holds the scaled durations.
type timing struct {
	prefillFixed, prefillPerToken   time.Duration
	transferFixed, transferPerToken time.Duration
	interToken, handshake, lease    time.Duration
	encode                          time.Duration
	keepAlive                       time.Duration
	stretch                         float64
}

const (
	defaultBlockSize = 16
	defaultBlocks    = 4096
	defaultSeqs      = 256
	maxDefaultLen    = 131072
	minKeepAlive     = time.Second
	maxRanks         = 8
	oldHold          = 480 * time.Second // VLLM_NIXL_ABORT_REQUEST_TIMEOUT, before kv_lease_duration
	policyFail       = "fail"
	policyRecompute  = "recompute"
	generationOld    = "old"
)

func orDefault[T int | float64 | string](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

func (o Options) withDefaults() (Options, error) {
	orDefault(&o.Name, "engine")
	orDefault(&o.Addr, "127.0.0.1:0")
	orDefault(&o.Model, "tiny")
	orDefault(&o.BlockSize, defaultBlockSize)
	orDefault(&o.KVCacheDtype, "auto")
	orDefault(&o.NumBlocks, defaultBlocks)
	orDefault(&o.MaxNumSeqs, defaultSeqs)
	orDefault(&o.Scale, 1)
	orDefault(&o.LoadStretch, 1)
	orDefault(&o.Ranks, 1)
	orDefault(&o.LoadFailurePolicy, policyFail)
	orDefault(&o.TPSize, 1)
	o.KVEvents.setDefaults()
	orDefault(&o.RecordBodies, 256)
	orDefault(&o.RecordBytes, 4<<20)
	if len(o.LoRAs) > 0 {
		orDefault(&o.MaxLoRAs, 1)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if err := o.check(); err != nil {
		return o, fmt.Errorf("simulated model server: %w", err)
	}
	orDefault(&o.MaxModelLen, min((o.NumBlocks-1)*o.BlockSize, maxDefaultLen))
	return o, o.Faults.check()
}

// check names the flag of baton simulate where there is one, and the field where there is none.
func (o Options) check() error {
	var errs []error
	if _, err := netip.ParseAddrPort(o.Addr); err != nil {
		errs = append(errs, fmt.Errorf("address to listen on: %q, must be ip:port", o.Addr))
	}
	for _, n := range []struct {
		name       string
		value, low int
	}{
		{"--block-size", o.BlockSize, 1},
		{"--num-blocks", o.NumBlocks, 2},
		{"--max-num-seqs", o.MaxNumSeqs, 1},
		{"--max-waiting", o.MaxWaiting, 0},
		{"--max-model-len", o.MaxModelLen, 0},
		{"--data-parallel-size", o.Ranks, 1},
		{"TPSize", o.TPSize, 1},
		{"MaxLoRAs", o.MaxLoRAs, 0},
		{"MetricsPage.Padding", o.MetricsPage.Padding, 0},
	} {
		if n.value < n.low || n.value > math.MaxInt32 {
			errs = append(errs, fmt.Errorf("%s: %d, must be from %d to %d", n.name, n.value, n.low, math.MaxInt32))
		}
	}
	if !(o.Scale > 0) || math.IsInf(o.Scale, 0) {
		errs = append(errs, fmt.Errorf("--scale: %v, must be above 0", o.Scale))
	}
	if o.Ranks > maxRanks {
		errs = append(errs, fmt.Errorf("--data-parallel-size: %d, must be from 1 to %d", o.Ranks, maxRanks))
	}
	if o.Ranks > 1 && (o.Generation == generationOld || o.Engine == engineSGLang || o.Engine == engineTRTLLM) {
		errs = append(errs, errors.New("--data-parallel-size: only with vLLM of the current generation"))
	}
	if o.SidePort < 0 || o.SidePort > math.MaxUint16 {
		errs = append(errs, fmt.Errorf("SidePort: %d, must be from 0 to %d", o.SidePort, math.MaxUint16))
	}
	if _, ok := wireKindOf(o.Engine, o.Connector); !ok {
		errs = append(errs, fmt.Errorf("--engine, --connector: %q, must be one of: %s", strings.TrimSpace(o.Engine+" "+o.Connector), wireNames()))
	}
	if o.LoadFailurePolicy != policyFail && o.LoadFailurePolicy != policyRecompute {
		errs = append(errs, fmt.Errorf("--kv-load-failure-policy: %q, must be fail or recompute", o.LoadFailurePolicy))
	}
	if !slices.Contains([]string{"", encoderExample, encoderNIXL}, o.Encoder) {
		errs = append(errs, fmt.Errorf("--encoder: %q, must be empty, %s or %s", o.Encoder, encoderExample, encoderNIXL))
	}
	errs = append(errs, o.KVEvents.check(o.Engine, o.Ranks))
	if o.Generation != "" && o.Generation != generationOld {
		errs = append(errs, fmt.Errorf("--generation: %q, must be empty or old", o.Generation))
	}
	return errors.Join(errs...)
}

func (o Options) timing() timing {
	kind, _ := wireKindOf(o.Engine, o.Connector)
	hold := kind.hold
	if kind.connector == connectorNIXL && o.Generation == generationOld {
		hold = oldHold
	}
	t := timing{
		prefillFixed:     o.duration(o.PrefillFixed, 5*time.Millisecond),
		prefillPerToken:  o.duration(o.PrefillPerToken, 20*time.Microsecond),
		transferFixed:    o.duration(o.TransferFixed, 2*time.Millisecond),
		transferPerToken: o.duration(o.TransferPerToken, time.Microsecond),
		interToken:       o.duration(o.InterToken, 5*time.Millisecond),
		encode:           o.duration(o.Encode, 20*time.Millisecond),
		handshake:        o.duration(o.Handshake, 50*time.Millisecond),
		lease:            o.duration(o.Lease, hold),
		keepAlive:        o.duration(o.KeepAlive, 5*time.Second),
		stretch:          max(o.LoadStretch, 0),
	}
	if o.KeepAlive == 0 {
		t.keepAlive = max(t.keepAlive, minKeepAlive)
	}
	return t
}

// duration applies default, "none" and scale.
func (o Options) duration(d, def time.Duration) time.Duration {
	if d == 0 {
		d = def
	}
	return time.Duration(float64(max(d, 0)) * o.Scale)
}
