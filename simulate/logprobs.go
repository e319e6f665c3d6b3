// SPDX-License-Identifier: Apache-2.0

package simulate

import "encoding/json"

// Log probabilities are made up from the token ids; only their shape is real.

type chatLogprob struct {
	Token   string        `json:"token"`
	Logprob float64       `json:"logprob"`
	Bytes   []int         `json:"bytes"`
	Top     []chatLogprob `json:"top_logprobs,omitempty"`
}

func logprobOf(id uint32) float64 { return -float64(mix(uint64(id))%5000+1) / 1000 }

func oneLogprob(id uint32) chatLogprob {
	l := chatLogprob{Token: tokenText(id), Logprob: logprobOf(id)}
	for _, b := range []byte(l.Token) {
		l.Bytes = append(l.Bytes, int(b))
	}
	return l
}

func chatLogprobs(ids []uint32, top int) json.RawMessage {
	list := make([]chatLogprob, 0, len(ids))
	for _, id := range ids {
		l := oneLogprob(id)
		for i := range top {
			l.Top = append(l.Top, oneLogprob(wordBase+(id+uint32(i))%uint32(wordCount)))
		}
		list = append(list, l)
	}
	return marshal(map[string]any{"content": list})
}

type completionLogprob struct {
	Offsets  []int                `json:"text_offset"`
	Logprobs []float64            `json:"token_logprobs"`
	Tokens   []string             `json:"tokens"`
	Top      []map[string]float64 `json:"top_logprobs"`
}

func completionLogprobs(q *sequence, top int) json.RawMessage {
	l := completionLogprob{Offsets: []int{}, Logprobs: []float64{}, Tokens: []string{}, Top: []map[string]float64{}}
	for i, id := range q.generated {
		l.Offsets = append(l.Offsets, i*pieceBytes)
		l.Logprobs = append(l.Logprobs, logprobOf(id))
		l.Tokens = append(l.Tokens, tokenText(id))
		best := map[string]float64{tokenText(id): logprobOf(id)}
		for n := range top {
			other := wordBase + (id+uint32(n))%uint32(wordCount)
			best[tokenText(other)] = logprobOf(other)
		}
		l.Top = append(l.Top, best)
	}
	return marshal(l)
}
