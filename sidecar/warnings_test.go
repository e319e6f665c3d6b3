// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"strings"
	"testing"

	"github.com/baton-epp/baton/config"
)

// TestWarnings: a connector for another engine, and switches without effect, are pointed out; nothing else is.
func TestWarnings(t *testing.T) {
	f := func(connector map[string]string, change func(*config.Disaggregation), want ...string) {
		t.Helper()
		c := config.Default().Disaggregation
		c.KVConnector = connector
		if change != nil {
			change(&c)
		}
		got := Warnings(&c)
		if len(got) != len(want) {
			t.Fatalf("%v: %q", connector, got)
		}
		for i := range want {
			if !strings.HasPrefix(got[i], want[i]) {
				t.Errorf("%v: %q, want %q", connector, got[i], want[i])
			}
		}
	}
	parallel := func(c *config.Disaggregation) { c.ParallelLegs = true }
	pulling := func(c *config.Disaggregation) { c.PullCachedPrefix = true }
	f(map[string]string{"": "nixlv2"}, nil)
	f(map[string]string{"": "sglang"}, nil)
	f(map[string]string{"our-engine": "sglang"}, nil)
	f(map[string]string{"vllm": "mooncake", "sglang": "shared-storage", "trtllm-serve": "trtllm"}, nil)
	f(map[string]string{"vllm": "sglang", "sglang": "nixlv2", "": "pigeon"}, nil,
		"disaggregation.kvConnector.sglang: nixlv2 is not known to work with this engine, but with vllm",
		"disaggregation.kvConnector.vllm: sglang is not known to work with this engine, but with sglang")
	f(map[string]string{"": "nixlv2"}, parallel, "disaggregation.parallelLegs")
	f(map[string]string{"": "nixlv2"}, pulling, "disaggregation.pullCachedPrefix")
	f(map[string]string{"": "nixlv2", "vllm": "offloading"}, parallel)
	f(map[string]string{"": "nixlv2", "vllm": "offloading"}, pulling)
}
