// SPDX-License-Identifier: Apache-2.0

package pool

import "time"

// Pace is what requests have shown about how fast an endpoint computes and hands over prompts. Nothing is asked of the
// endpoint: the times are those of requests that ran anyway. Safe for concurrent use, without locks.
type Pace struct{}

// Prefilled notes that a prefill of uncached prompt tokens was answered after took, its wait in the queue included.
func (p *Pace) Prefilled(uncached int64, took time.Duration) {}

// Received notes that a decode endpoint sent its first byte took after it was given a prompt of tokens whose KV blocks
// it had to fetch.
func (p *Pace) Received(tokens int64, took time.Duration) {}

// TokensPerSecond is the learned prefill speed, prompt tokens that no cache holds per second; 0 while nothing is known.
func (p *Pace) TokensPerSecond() float64 { return 0 }

// Queue is the learned wait before a prefill begins; 0 while nothing is known.
func (p *Pace) Queue() time.Duration { return 0 }

// Transfer is the learned time to fetch the blocks of a prompt of tokens and to say the first byte; 0 while nothing is
// known.
func (p *Pace) Transfer(tokens int64) time.Duration { return 0 }
