// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"strconv"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// offloading is vLLM's OffloadingConnector with a p2p tier: a rendezvous by an id that is minted here. Prefill parks
// the prompt's blocks under it and names nobody; decode gets the prefiller's address and fetches them. Any order of
// the legs is correct, yet decode's fetch fails 30 s after it began, queueing at the prefill endpoint included: hence
// Serial, as llm-d has it by now, and Overlaps. Blocks that nobody fetches are dropped 60 s after they were stored.
// Several choices (n > 1) are kept away by Traits.OneChoice: the engines keep one fetch for each id, and the first choice
// to end cancels those of the others.
//
// Either leg, or a request that decode serves alone, can also fetch the cached part of its prompt from a third
// endpoint, as remote_kv_source. A miss there is computed locally.
type offloading struct{}

func (offloading) Prefill(x *Exchange, body *inference.Edits) {
	OneToken(x.Request, body)
	x.Ticket = newUUID()
	params := `{"remote_decoder":{"kv_request_id":"` + x.Ticket + `"}`
	if x.Source != nil {
		params += `,"remote_kv_source":` + fetchFrom(x.Source, newUUID(), x.Ports.P2P)
	}
	setTransfer(x.Request, []byte(params+"}"), body)
}

// Answer does not look at the answer except for errors.
func (offloading) Answer(_ *Exchange, answer []byte) Answer {
	r, _ := read(answer)
	return r.Answer
}

func (offloading) Decode(x *Exchange, _ []byte, body *inference.Edits) {
	if x.Ticket == "" {
		return // no prefill was asked for
	}
	params := `{"remote_prefiller":` + fetchFrom(x.Prefiller, x.Ticket, x.Ports.P2P) + `}`
	setTransfer(x.Request, []byte(params), body)
}

func (offloading) Withdraw(x *Exchange, body *inference.Edits) { clearTransfer(x.Request, body) }

func (offloading) Pull(x *Exchange, body *inference.Edits) {
	if x.Source == nil {
		return
	}
	params := `{"remote_kv_source":` + fetchFrom(x.Source, newUUID(), x.Ports.P2P) + `}`
	setTransfer(x.Request, []byte(params), body)
}

// fetchFrom names the blocks of one request at one endpoint. vLLM serves each data-parallel rank at a port of its own,
// counted from the one it was given.
func fetchFrom(e *pool.Endpoint, id string, fallback int) string {
	at := strconv.Itoa(port(e, P2PPortLabel, fallback) + e.Rank)
	return `{"kv_request_id":"` + id + `","remote_host":"` + hostOf(e) + `","remote_port":` + at + `}`
}
