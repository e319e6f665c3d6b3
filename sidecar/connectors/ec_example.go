// SPDX-License-Identifier: Apache-2.0

package connectors

import "github.com/baton-epp/baton/inference"

// ecExample is encoder disaggregation by a store that all engines share (vLLM's ECExampleConnector): each item is sent
// alone to an encode endpoint, which puts what it computed into the store. The others find it there by the hash that
// every engine makes of the media itself, so nothing travels through here, and no body but the encode legs' is changed.
type ecExample struct{}

func (ecExample) Item(x *Encoding, item int) (inference.Body, bool) {
	part, ok := contentPart(x.Request, item)
	if !ok {
		return inference.Body{}, false
	}
	return encodeBody(x, part), true
}

// Answer does not look at the answer except for errors.
func (ecExample) Answer(_ *Encoding, _ int, answer []byte) Answer {
	r, _ := read(answer)
	return r.Answer
}

func (ecExample) Splice(*Encoding, [][]byte, bool, *inference.Edits) {}
