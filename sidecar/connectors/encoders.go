// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"fmt"
	"slices"
	"strings"

	"github.com/baton-epp/baton/inference"
)

// Encoder is one wire between encode endpoints and the endpoint that uses what they computed. Like a [Connector] it only
// writes bodies and reads answers, holds no state of requests and is safe for concurrent use.
type Encoder interface {
	// Item returns the body of the encode leg for one item of x.Request.Media: chunks of the client's body, which are
	// not copied, and bytes of its own. False: the item cannot be encoded apart.
	Item(x *Encoding, item int) (inference.Body, bool)
	// Answer reads the body of a 200 that answered an encode leg; its Handle, an own copy, is for Splice. It keeps no
	// part of answer.
	Answer(x *Encoding, item int, answer []byte) Answer
	// Splice puts what was encoded into the body of a further leg: consumer says that the leg's endpoint uses the
	// embeddings; otherwise it only needs to count their placeholders. handles has one entry per item, nil for an item
	// that was not encoded, whose raw media stays. It may be called again for the same body: then the last call counts.
	Splice(x *Encoding, handles [][]byte, consumer bool, body *inference.Edits)
}

// Encoding is the encode phase of one request: the same value for every method.
type Encoding struct {
	Request *inference.Request
	// Model is what encode endpoints are asked for when it is not the name that the client sent; "" = as sent.
	Model string
	// Lean lets Splice replace raw media by embeddings (disaggregation.encode.embeds).
	Lean bool
	// Keys identify the items by kind and content, in hexadecimal ([MediaKey]): equal items have equal keys, here and on
	// every replica.
	Keys []string
}

// EncoderTraits are the fixed facts of an encoder wire.
type EncoderTraits struct {
	Name   string
	Proven string // real engine, from source or unconfirmed (docs/design.md 3.3)
	// APIs lists the APIs whose media items can be sent alone.
	APIs []inference.API
}

// Serves reports whether the wire carries requests of api.
func (t *EncoderTraits) Serves(api inference.API) bool { return slices.Contains(t.APIs, api) }

// LookupEncoder returns the encoder connector of that name, or an error that says which names there are.
func LookupEncoder(name string) (Encoder, EncoderTraits, error) {
	all := encoders()
	if e, ok := all[name]; ok {
		e.traits.Name = name
		return e.encoder, e.traits, nil
	}
	names := make([]string, 0, len(all))
	for n := range all {
		names = append(names, n)
	}
	slices.Sort(names)
	return nil, EncoderTraits{}, fmt.Errorf("%q is not an encoder connector (built: %s)", name, strings.Join(names, ", "))
}
