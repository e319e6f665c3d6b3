// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"strconv"

	"github.com/baton-epp/baton/pool"
)

// Labels of a pod that say on which port its engine serves one wire, for pods that differ from the configured port
// (config.Ports).
const (
	// BootstrapPortLabel is where an SGLang prefill endpoint registers KV transfers; the name is SGLang's own.
	BootstrapPortLabel = "sglang.ai/bootstrap-port"
	// MooncakePortLabel is the bootstrap server of a vLLM with the MooncakeConnector.
	MooncakePortLabel = "baton-epp/mooncake-port"
	// P2PPortLabel is the peer-to-peer tier of a vLLM with the OffloadingConnector, at data-parallel rank 0; the other
	// ranks' follow it.
	P2PPortLabel = "baton-epp/p2p-port"
	// LMCacheInitPortLabel is where an LMCache receiver is introduced to its sender, at tensor-parallel rank 0; the other
	// ranks' follow it.
	LMCacheInitPortLabel = "baton-epp/lmcache-init-port"
	// LMCacheDataPortLabel is where an LMCache receiver hands out memory for what it is about to be sent, by rank as well.
	LMCacheDataPortLabel = "baton-epp/lmcache-data-port"
)

// port returns the port that e's label names, otherwise fallback: a label that is no port says nothing.
func port(e *pool.Endpoint, label string, fallback int) int {
	if n, err := strconv.ParseUint(e.Labels[label], 10, 16); err == nil && n != 0 {
		return int(n)
	}
	return fallback
}

// hostOf returns e's address as engines expect it in a body: IPv6 without brackets and zone.
func hostOf(e *pool.Endpoint) string { return e.Addr.Addr().Unmap().WithZone("").String() }
