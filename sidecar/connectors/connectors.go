// SPDX-License-Identifier: Apache-2.0

// Package connectors knows the wires by which engines move KV blocks from a prefill to a decode endpoint: one file
// per wire, one line in the registry. A [Connector] only writes bodies and reads answers; it never sends, waits,
// retries, counts or logs, which package sidecar does for all of them. Handles are opaque bytes: scanned, copied, and
// never decoded into structs, so that no number passes through a float64. Floor 3, below package sidecar.
//
// A connector has one method per moment at which a wire can differ. Every wire in use has one of four shapes:
//
//   - Serial with handle. Prefill runs to its end, [Connector.Answer] cuts the handle out of what it said, and
//     [Connector.Decode] splices it into the decode body. nixlv2 (vLLM, pull and push) and moriio (READ) take
//     kv_transfer_params whole; trtllm puts its handle together from the choice's disaggregated_params, the token ids,
//     which replace decode's prompt, and the usage.
//   - Serial blind. Decode looks for the blocks by itself, so Answer says [Ready] without a handle and Decode does
//     nothing. shared-storage: the engines meet in a store that neither leg names; it is an [Asker], for clients that
//     let decode say whether it has enough. lmcache-pd: prefill writes into decode's buffer and must know its ports
//     before ([Traits].NeedsDecode).
//   - Rendezvous. An id minted here goes into both legs. Prefill writes it and keeps it in [Exchange].Ticket, Decode
//     reads it there and is called with a nil handle, before the prefill answered where [Traits].Shape says so; Answer
//     says [Ready] or [Failed]. sglang (bootstrap_room) and mooncake (transfer_id) run both legs at once, offloading
//     (kv_request_id) one after the other; it can also fetch cached blocks from a third endpoint ([Puller]). Two
//     moments exist only here: [Introducer], for what must be asked of a prefiller once per pod (mooncake's /query), and
//     [Aborter], for the call that frees the other leg (sglang's /abort_request).
//   - Fan-out and join. Encoders move no KV and have an interface of their own, [Encoder]: one leg for each media item,
//     and what they answered goes into the next legs. ec-example: nothing does, the engines share a store. ec-nixl: the
//     answers' ec_transfer_params become one map.
package connectors

import (
	"fmt"
	"slices"
	"strings"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// Connector is one wire. Implementations hold no state of requests and are safe for concurrent use. What only some wires
// need are the optional interfaces [Introducer], [Aborter], [Asker] and [Puller].
type Connector interface {
	// Prefill makes the client's body into that of the prefill leg. body is a fresh list of edits; what the client
	// sent in transfer fields is removed from it already.
	Prefill(x *Exchange, body *inference.Edits)
	// Answer reads the body of a 200 that answered the prefill leg. It keeps no part of answer. Where decode is sent before
	// the prefill answered, x.Request has no Body any more.
	Answer(x *Exchange, answer []byte) Answer
	// Decode puts into the decode leg's body what lets it find the blocks. handle is what Answer returned; nil where
	// decode is sent before the prefill answered.
	Decode(x *Exchange, handle []byte, body *inference.Edits)
	// Withdraw takes back what Decode did: the decode endpoint is to compute everything itself.
	Withdraw(x *Exchange, body *inference.Edits)
}

// Introducer is a connector that asks each prefill endpoint something once, before its first prefill: what it said is
// kept as long as the pod lives, and dropped when a prefill or transfer there fails.
type Introducer interface {
	// Introduce names the GET request: a port of the prefill endpoint's own address, and a path.
	Introduce(x *Exchange) (port uint16, path string)
	// Introduced checks the body of the 200; a good one is [Exchange].Facts from then on.
	Introduced(answer []byte) error
}

// Aborter is a connector whose engines need a request of their own to let go of a decode that waits for a prefill which
// failed.
type Aborter interface {
	// Abort returns path and body of the POST to the decode endpoint.
	Abort(x *Exchange) (path string, body []byte)
}

// Asker is a connector that can find out from the decode endpoint whether it holds enough of the prompt: then no prefill
// is needed.
type Asker interface {
	// Ask makes the client's body into the question; false = this request does not ask.
	Ask(x *Exchange, body *inference.Edits) bool
	// Enough reads the body of the 200 that answered it.
	Enough(x *Exchange, answer []byte) bool
}

// Puller is a connector by which an endpoint can fetch the cached part of a prompt from a third one, [Exchange].Source.
type Puller interface {
	// Pull writes that into the body of a request which is served by decode alone. Connector.Prefill does the same for
	// the prefill leg by itself.
	Pull(x *Exchange, body *inference.Edits)
}

// Exchange is one prefill for one request: the same value for every method, made anew for each attempt.
type Exchange struct {
	Request   *inference.Request
	Prefiller *pool.Endpoint
	Decode    *pool.Endpoint // the pick so far; nil while there is none
	// Source is an endpoint that holds more of the prompt than the one that is to compute it; nil when there is none or
	// nobody may pull (disaggregation.pullCachedPrefix).
	Source *pool.Endpoint
	// RewriteHost lets a loopback name in a handle be replaced by the prefiller's address.
	RewriteHost bool
	Ports       config.Ports
	// Facts is what the prefill endpoint answered to an [Introducer].
	Facts []byte
	// Ticket is what a rendezvous connector minted in Prefill for its Decode, Answer and Abort.
	Ticket string
	// Rank is set by Prefill to the data-parallel rank that the prefill leg asks for (X-data-parallel-rank); -1 before
	// it, and for none.
	Rank int
}

// Verdict is what a prefill's answer means.
type Verdict uint8

// The verdicts.
const (
	// Ready: decode may be told to take over.
	Ready Verdict = iota
	// Complete: there is nothing to hand over since generation ended with the first token; decode starts afresh.
	Complete
	// Missing: the handle is not there although it should be; the prefill endpoint is set up wrongly.
	Missing
	// Incomplete: the handle lacks a field without which the decode engine would hang or die.
	Incomplete
	// Failed: the engine reports an error inside a 200.
	Failed
	// Malformed: this is no answer of an engine.
	Malformed
)

// Answer is what a connector found in a prefill's answer.
type Answer struct {
	Verdict      Verdict
	Handle       []byte // for Decode, an own copy; nil unless Ready
	PromptTokens int64  // tokens whose blocks the prefill endpoint holds now; 0 when it did not say
	CachedTokens int64  // of these, found in its prefix cache (usage.prompt_tokens_details.cached_tokens); -1 when it did not say
	Rewritten    bool   // a loopback name was replaced by the prefiller's address
}

// Shape is the order in which the legs run.
type Shape uint8

// The shapes.
const (
	Serial     Shape = iota // prefill to its end, then decode
	Rendezvous              // both legs at once
)

// Traits are the fixed facts of a wire.
type Traits struct {
	Name   string
	Proven string // real engine, from source or unconfirmed (docs/design.md 3.3)
	Shape  Shape
	// Engines lists the engine types (pool.Endpoint.Engine) that speak the wire.
	Engines []string
	// Overlaps says that a Serial wire may be run as a Rendezvous (disaggregation.parallelLegs).
	Overlaps bool
	// NeedsDecode says that the decode endpoint must be known before prefill starts: what it prefilled is for that
	// endpoint only.
	NeedsDecode bool
	// Aggregates says that a decode endpoint does the prefill itself when it is told nothing.
	Aggregates bool
	// Claims says that blocks stay held, at the prefill endpoint or in decode's receiver, until the decode leg takes them,
	// which it can once.
	Claims bool
	// EndsDecode says that a decode whose prefill failed waits in vain and is ended at once; otherwise it helps itself.
	EndsDecode bool
	// OneChoice says that the wire cannot carry a request for several choices (n > 1).
	OneChoice bool
	// Bars are the properties of a request that this wire cannot carry.
	Bars inference.Bar
	// APIs lists the APIs whose bodies the wire can be spliced into.
	APIs []inference.API
}

// Serves reports whether the wire carries requests of api.
func (t *Traits) Serves(api inference.API) bool { return slices.Contains(t.APIs, api) }

// Lookup returns the connector of that name, or an error that says which names there are.
func Lookup(name string) (Connector, Traits, error) {
	all := registry()
	if e, ok := all[name]; ok {
		e.traits.Name = name
		return e.connector, e.traits, nil
	}
	built := make([]string, 0, len(all))
	for n := range all {
		built = append(built, n)
	}
	slices.Sort(built)
	return nil, Traits{}, fmt.Errorf("%q is not a connector (built: %s)", name, strings.Join(built, ", "))
}
