// SPDX-License-Identifier: Apache-2.0

package config

import "time"

// Disaggregation says whether and how prefill and encode are run apart from decode (docs/design.md 3 and 5).
type Disaggregation struct {
	Mode string `yaml:"mode"` // auto (default) | orchestrate | headers | off
	// KVConnector maps an engine type to the connector that moves its KV blocks; the key "" is every other engine.
	// In the file also a plain name. Default nixlv2.
	KVConnector       map[string]string `yaml:"kvConnector,orstring"`
	ECConnector       string            `yaml:"ecConnector"`       // "" (default) | ec-example | ec-nixl
	Budget            time.Duration     `yaml:"budget"`            // the whole held phase of one request, default 120s
	DecodePick        string            `yaml:"decodePick"`        // before (default) | after the prefill
	OnFailure         string            `yaml:"onFailure"`         // aggregate (default) | fail
	HandleMaxAge      time.Duration     `yaml:"handleMaxAge"`      // default 25s, below the engine's lease
	RewriteRemoteHost string            `yaml:"rewriteRemoteHost"` // auto (default) | never
	Reclaim           bool              `yaml:"reclaim"`           // claim and drop a finished prefill whose client has left
	// AcceptClientTransferFields lets clients send kv_transfer_params: only for pools whose callers orchestrate themselves.
	AcceptClientTransferFields bool     `yaml:"acceptClientTransferFields"`
	PairLabels                 []string `yaml:"pairLabels"` // labels that prefill and decode must share
	// ParallelLegs sends decode while prefill runs, with a connector that is serial by default and allows it (offloading).
	ParallelLegs bool `yaml:"parallelLegs"`
	// PullCachedPrefix lets an endpoint fetch a prompt's cached prefix from a third one (offloading's remote_kv_source).
	PullCachedPrefix bool `yaml:"pullCachedPrefix"`
	// HoldResponse is how long the head of a streamed response waits for a prefill that still runs beside decode, so that its
	// failure is a 502; default 150ms, below Envoy's default message_timeout. FULL_DUPLEX responses wait without it.
	HoldResponse time.Duration `yaml:"holdResponse"`
	Ports        Ports         `yaml:"ports"`
	Prefill      PrefillLimits `yaml:"prefill"`
	Encode       EncodeLimits  `yaml:"encode"`
	RetryBudget  RetryBudget   `yaml:"retryBudget"`
	Breaker      Breaker       `yaml:"breaker"`
	Transport    Transport     `yaml:"transport"`
}

// PrefillLimits bounds prefill sub-requests.
type PrefillLimits struct {
	Timeout                  time.Duration `yaml:"timeout"`                   // one attempt, default 60s
	ConnectTimeout           time.Duration `yaml:"connectTimeout"`            // default 1s
	Attempts                 int           `yaml:"attempts"`                  // 1–10, default 2
	MaxConcurrentPerEndpoint int           `yaml:"maxConcurrentPerEndpoint"`  // 1 or more, default 64
	MaxResponseBytes         int64         `yaml:"maxResponseBytes,quantity"` // default 1Mi
}

// Ports are the side channels that connectors name to engines, where an endpoint's label does not say otherwise
// (package connectors lists the labels). 1–65535.
type Ports struct {
	SGLang      int `yaml:"sglang"`      // bootstrap server of prefill endpoints, default 8998
	Mooncake    int `yaml:"mooncake"`    // VLLM_MOONCAKE_BOOTSTRAP_PORT of prefill endpoints, default 8998
	P2P         int `yaml:"p2p"`         // VLLM_P2P_SIDE_CHANNEL_PORT, to which the data-parallel rank is added, default 5710
	LMCacheInit int `yaml:"lmcacheInit"` // receiver of decode endpoints, default 7300
	LMCacheData int `yaml:"lmcacheData"` // allocation port of the same, default 7400
}

// EncodeLimits bounds encode sub-requests.
type EncodeLimits struct {
	Timeout  time.Duration `yaml:"timeout"`  // one attempt, default 30s
	Attempts int           `yaml:"attempts"` // 1–10, default 2
	Parallel int           `yaml:"parallel"` // items of one request at once, 1 or more, default 8
	Embeds   string        `yaml:"embeds"`   // safe (default) keeps raw media in the body, lean replaces it
}

// RetryBudget bounds retries pool-wide.
type RetryBudget struct {
	Ratio        float64 `yaml:"ratio"`        // retries allowed per request served, 0–1, default 0.2
	MinPerSecond float64 `yaml:"minPerSecond"` // always allowed, 0 or more, default 3
}

// Breaker opens per endpoint and per prefill–decode pair.
type Breaker struct {
	Failures int           `yaml:"failures"` // consecutive, 1 or more, default 5
	OpenFor  time.Duration `yaml:"openFor"`  // default 10s
}

// Transport is how sub-requests reach model servers.
type Transport struct {
	Scheme             string   `yaml:"scheme"`     // http (default) | https
	CACertPath         string   `yaml:"caCertPath"` // PEM file, "" = the system's
	InsecureSkipVerify bool     `yaml:"insecureSkipVerify"`
	ForwardHeaders     []string `yaml:"forwardHeaders"` // client headers that prefill and encode see, default [authorization]
}

// Limits bounds what requests may hold.
type Limits struct {
	MaxBodyBytes int64 `yaml:"maxBodyBytes,quantity"`      // one request, 413 above; default 64Mi
	MaxHeldBytes int64 `yaml:"maxHeldBytes,quantity,auto"` // all requests, at least maxBodyBytes, 429 above; 0 = auto: min(2Gi, half the memory limit)
	// AllowUninspectedBodies lets bodies pass that the gateway does not let us see.
	AllowUninspectedBodies bool `yaml:"allowUninspectedBodies"`
}

// Scraping is how often and how much of the model servers' metrics is read.
type Scraping struct {
	BusyInterval time.Duration `yaml:"busyInterval"`          // an endpoint with requests in flight, default 50ms
	IdleInterval time.Duration `yaml:"idleInterval"`          // any other, default 2s
	Timeout      time.Duration `yaml:"timeout"`               // one scrape, default 1s
	MaxPageBytes int64         `yaml:"maxPageBytes,quantity"` // default 4Mi
	NameFilter   string        `yaml:"nameFilter"`            // auto (default) | never
}

func defaultDisaggregation() Disaggregation {
	return Disaggregation{
		Mode:              "auto",
		KVConnector:       map[string]string{"": "nixlv2"},
		Budget:            120 * time.Second,
		DecodePick:        "before",
		OnFailure:         "aggregate",
		HandleMaxAge:      25 * time.Second,
		RewriteRemoteHost: "auto",
		PairLabels:        []string{},
		HoldResponse:      150 * time.Millisecond,
		Ports:             Ports{SGLang: 8998, Mooncake: 8998, P2P: 5710, LMCacheInit: 7300, LMCacheData: 7400},
		Prefill: PrefillLimits{
			Timeout:                  60 * time.Second,
			ConnectTimeout:           time.Second,
			Attempts:                 2,
			MaxConcurrentPerEndpoint: 64,
			MaxResponseBytes:         1 << 20,
		},
		Encode:      EncodeLimits{Timeout: 30 * time.Second, Attempts: 2, Parallel: 8, Embeds: "safe"},
		RetryBudget: RetryBudget{Ratio: 0.2, MinPerSecond: 3},
		Breaker:     Breaker{Failures: 5, OpenFor: 10 * time.Second},
		Transport:   Transport{Scheme: "http", ForwardHeaders: []string{"authorization"}},
	}
}
