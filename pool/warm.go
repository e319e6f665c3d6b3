// SPDX-License-Identifier: Apache-2.0

package pool

// Warm is the set of prefill endpoints that a decode endpoint has fetched blocks from: the next transfer between the two
// needs no handshake, which takes vLLM's NIXL connector some 5 s. Kept at the decode endpoint's state, by the prefill
// endpoint's slot. Safe for concurrent use, without locks.
type Warm struct{}

// Add notes a transfer from the endpoint in slot.
func (w *Warm) Add(slot uint32) {}

// Has reports whether there was one.
func (w *Warm) Has(slot uint32) bool { return false }

// Forget is told that the endpoint in slot left or failed a transfer.
func (w *Warm) Forget(slot uint32) {}
