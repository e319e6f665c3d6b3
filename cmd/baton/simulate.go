// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/baton-epp/baton/simulate"
)

const simulateHelp = `Run a pool of simulated model servers on loopback: real HTTP, real metrics pages, prefix caches, KV transfer with leases,
and faults on demand. No GPU, no model.

  baton simulate --prefill 2 --decode 3 --base-port 18100 --endpoints-file endpoints.yaml

The endpoints file is what baton serve's file-discovery reads, with the labels that the connector needs. --connector
mooncake opens a bootstrap server beside each engine; the other side channels are inside the process.
--kv-events-endpoint publishes what the prefix caches hold, as vLLM does. Each engine answers its own API (GET
/kv_event_sources says where it publishes) and, beside it,
  GET  /admin/state    what it holds, leaked, pulled and aborted
  POST /admin/clock    {"jump_ms":30000} moves the clock of the lease timers
  POST /admin/faults   {"rules":[{"phase":"prefill","kind":"status","status":503,"probability":0.1}]}`

func newSimulate() *cobra.Command {
	var o simulate.PoolOptions
	var faults []string
	verbosity := 2
	cmd := &cobra.Command{
		Use: "simulate", Short: "Run a pool of simulated model servers", Long: simulateHelp, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			errs := make([]error, 0, len(faults))
			for _, text := range faults {
				f, err := simulate.ParseFault(text)
				errs = append(errs, err)
				o.Template.Faults.Rules = append(o.Template.Faults.Rules, f)
			}
			if err := errors.Join(errs...); err != nil {
				return err
			}
			return simulate.RunPool(cmd.Context(), o, logger(verbosity, false))
		},
	}
	fs := cmd.Flags()
	fs.SortFlags = false
	simulateFlags(fs, &o)
	eventFlags(fs, &o.Template)
	fs.StringArrayVar(&faults, "fault", nil, "inject a fault, such as kind=status,phase=prefill,status=503,next=2; may be repeated")
	fs.IntVarP(&verbosity, "v", "v", verbosity, "log verbosity")
	return cmd
}

func simulateFlags(fs *pflag.FlagSet, o *simulate.PoolOptions) {
	t := &o.Template
	fs.IntVar(&o.Prefill, "prefill", 0, "engines with role prefill")
	fs.IntVar(&o.Decode, "decode", 0, "engines with role decode")
	fs.IntVar(&o.Both, "both", 0, "engines with role prefill-decode")
	fs.IntVar(&o.Plain, "plain", 0, "engines without a role")
	fs.IntVar(&o.Encode, "encode", 0, "engines with role encode, which do nothing else")
	fs.IntVar(&o.EncodePrefill, "encode-prefill", 0, "engines with role encode-prefill")
	fs.IntVar(&o.EncodePrefillDecode, "encode-prefill-decode", 0, "engines with role encode-prefill-decode")
	fs.StringVar(&o.Host, "host", "127.0.0.1", "address to listen on")
	fs.IntVar(&o.BasePort, "base-port", 0, "port of the first engine, the others follow (0 = free ports)")
	fs.StringVar(&o.EndpointsFile, "endpoints-file", "", "file to write for baton serve's file-discovery")
	fs.StringVar(&t.Model, "model", "tiny", "served model name")
	fs.StringVar(&t.Generation, "generation", "", `"" for vLLM 0.32, "old" for flat block ids and older metric names`)
	fs.StringVar(&t.Engine, "engine", "", "vllm (default), sglang or trtllm")
	fs.StringVar(&t.Connector, "connector", "", "how KV moves; for vllm nixlv2 (default), nixl-push, moriio, mooncake, offloading, shared-storage or lmcache-pd; for sglang mooncake (default) or nixl")
	fs.StringVar(&t.Encoder, "encoder", "", `how encoded media reaches other engines: "" (not at all), ec-example or ec-nixl`)
	fs.IntVar(&t.Ranks, "data-parallel-size", 1, "data-parallel ranks of each engine; vLLM only")
	fs.BoolVar(&o.RankPorts, "data-parallel-ports", false, "each rank on a port of its own, as an engine of its own")
	fs.IntVar(&t.SidePort, "bootstrap-port", 0, "port of the first engine's bootstrap server, where the connector has one (0 = free ports)")
	fs.Uint64Var(&t.Seed, "seed", 0, "seed of ids and fault draws (0 = drawn)")
	fs.IntVar(&t.BlockSize, "block-size", 0, "tokens in a KV block (default 16)")
	fs.IntVar(&t.NumBlocks, "num-blocks", 0, "KV blocks (default 4096)")
	fs.IntVar(&t.MaxNumSeqs, "max-num-seqs", 0, "sequences that run at once (default 256)")
	fs.IntVar(&t.MaxWaiting, "max-waiting", 0, "sequences that may wait before 503 (0 = no limit)")
	fs.IntVar(&t.MaxModelLen, "max-model-len", 0, "tokens of prompt and answer (default what the blocks hold)")
	fs.Float64Var(&t.Scale, "scale", 1, "multiplies every duration")
	fs.DurationVar(&t.PrefillFixed, "prefill-fixed", 0, "time of a prefill (default 5ms)")
	fs.DurationVar(&t.PrefillPerToken, "prefill-per-token", 0, "time per uncached prompt token (default 20µs)")
	fs.DurationVar(&t.TransferFixed, "transfer-fixed", 0, "time of a KV pull (default 2ms)")
	fs.DurationVar(&t.TransferPerToken, "transfer-per-token", 0, "time per token pulled (default 1µs)")
	fs.DurationVar(&t.InterToken, "inter-token", 0, "time between tokens (default 5ms)")
	fs.DurationVar(&t.Encode, "encode-time", 0, "time to encode an image or another media item (default 20ms)")
	fs.DurationVar(&t.Handshake, "handshake", 0, "first contact of a prefill and a decode engine (default 50ms)")
	fs.DurationVar(&t.Lease, "lease", 0, "how long a finished prefill is held (default the connector's; nixlv2: 30s, 480s with --generation old)")
	fs.StringVar(&t.LoadFailurePolicy, "kv-load-failure-policy", "", "fail (default) or recompute")
	fs.StringVar(&t.RemoteHost, "remote-host", "", "host in KV handles (default the engine's)")
}

// eventFlags are those of KV events.
func eventFlags(fs *pflag.FlagSet, t *simulate.Options) {
	fs.StringVar(&t.KVEvents.Endpoint, "kv-events-endpoint", "", "publish KV events at tcp://*:PORT on the engine's address: the first engine's port, the other ranks and engines follow (0 = free ports, see GET /kv_event_sources)")
	fs.StringVar(&t.KVEvents.Replay, "kv-events-replay-endpoint", "", "answer replay requests for KV events, likewise")
	fs.StringVar(&t.KVEvents.Topic, "kv-events-topic", "", "topic of KV events; {addr} and {model} stand for the engine's")
	fs.StringVar(&t.KVEvents.Encoding, "kv-events-encoding", "", `"" for maps (vLLM 0.32), "array" for what was before`)
	fs.BoolVar(&t.KVEvents.ClearOnStart, "kv-events-clear-on-start", false, "tell of a restart by AllBlocksCleared, not by the sequence alone as vLLM 0.32 does")
	fs.StringVar(&t.HashSeed, "hash-seed", "", "PYTHONHASHSEED of the engines (default that of a vLLM 0.32 without it)")
}
