// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"slices"
	"time"
)

// Encoding is one media item whose embeddings an engine needed, and how they came.
type Encoding struct {
	At        time.Time `json:"at"`
	RequestID string    `json:"request_id"`
	Key       string    `json:"key"`  // mm hash
	Kind      string    `json:"kind"` // image, audio or video
	// How is "encoded" (here, on an encode leg), "local" (here, for the engine's own use), "cache", "store" (the shared
	// one) or "peer" (read by a handle); "" when it failed.
	How  string `json:"how"`
	From string `json:"from"`          // the engine that encoded it
	Err  string `json:"err,omitempty"` // why the handle's peer did not give it
}

// Pin is an encoded item that waits on its encoder to be read by a consumer.
type Pin struct {
	Engine    string    `json:"engine"`
	RequestID string    `json:"request_id"`
	Key       string    `json:"key"`
	Bytes     int       `json:"bytes"`
	Since     time.Time `json:"since"`
	Expires   time.Time `json:"expires"`
	At        time.Time `json:"at,omitzero"` // when it expired, of a leak
}

func (r *records) encoding(v Encoding) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.encodings = push(r.encodings, v)
	switch v.How {
	case encodedForOthers:
		r.totals.encoded++
	case encodedLocally:
		r.totals.encodedLocally++
	case encodedStored, encodedFetched:
		r.totals.fetchedEncodings++
	case "":
		r.totals.failedEncodings++
	}
}

func (r *records) leakedEncoding(v Pin) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leakedPins = push(r.leakedPins, v)
	r.totals.leakedEncodings++
}

// Encodings lists the media items that the engine encoded or got, oldest first.
func (e *Engine) Encodings() []Encoding { return snapshot(&e.records, &e.records.encodings) }

// LeakedEncodings lists the pins that nobody read in time, over all processes of the engine.
func (e *Engine) LeakedEncodings() []Pin { return snapshot(&e.records, &e.records.leakedPins) }

// HeldEncodings lists what is pinned for consumers now, oldest first.
func (e *Engine) HeldEncodings() []Pin {
	front := e.running()
	if front == nil {
		return nil
	}
	var out []Pin
	for _, p := range front.ranks {
		p.enc.mu.Lock()
		for _, list := range p.enc.pins {
			for _, one := range list {
				out = append(out, one.rec)
			}
		}
		p.enc.mu.Unlock()
	}
	slices.SortFunc(out, func(a, b Pin) int { return a.Since.Compare(b.Since) })
	return out
}
