// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
)

// moriio is vLLM's MoRIIOConnector in READ mode: a handle as NIXL's, by whose block ids the decode engine reads, with a
// transfer_id that the router gives and ports for handshake and notification. Known from its source, not from a run;
// its timer is a guess.
type moriio struct{ p *process }

func newMoRIIO(p *process) wire { return &moriio{p} }

func (*moriio) stop() {}

// firstNotifyPort is the default of the notify port, which counts ranks as the handshake port does.
const firstNotifyPort = 61005

// moriioHandle is kv_transfer_params of a prefill answer.
type moriioHandle struct {
	DoRemotePrefill bool    `json:"do_remote_prefill"`
	DoRemoteDecode  bool    `json:"do_remote_decode"`
	BlockIDs        []int32 `json:"remote_block_ids"`
	EngineID        string  `json:"remote_engine_id"`
	Host            string  `json:"remote_host"`
	HandshakePort   int     `json:"remote_handshake_port"`
	NotifyPort      int     `json:"remote_notify_port"`
	DPSize          int     `json:"remote_dp_size"`
	TPSize          int     `json:"tp_size"`
	TransferID      string  `json:"transfer_id"`
}

// moriioLeg is a leg of either kind; t of a decode leg is its handle, the handshake port as its port.
type moriioLeg struct {
	p       *process
	id      string // transfer_id
	prefill bool
	t       *transfer
}

// read refuses a prefill leg without transfer_id, which the engine looks up when it answers.
func (m *moriio) read(c *call, _ *fields) (leg, *apiError) {
	params := c.params(memberTransfer)
	if params == nil {
		return nil, nil
	}
	t := readTransfer(params)
	t.port, _ = params.integer("remote_handshake_port")
	l := &moriioLeg{p: m.p, id: params.text("transfer_id"), prefill: t.doRemoteDecode, t: t}
	c.fields.adopt(params)
	switch {
	case !t.doRemoteDecode && !t.doRemotePrefill:
		return nil, nil
	case t.doRemoteDecode && l.id == "":
		return nil, errInternal
	case !l.prefill && (l.id == "" || t.engineID == "" || t.host == "" || t.port == 0 || len(t.blocks) == 0):
		m.p.e.records.count(func(t *totals) { t.invalidParams++ })
		return nil, nil // a warning, and everything is computed locally
	}
	return l, nil
}

func (l *moriioLeg) phase() string {
	if l.prefill {
		return phasePrefill
	}
	return phaseTransfer
}

func (l *moriioLeg) load(ctx context.Context, g *group) (died string, err error) {
	if l.prefill {
		return "", nil
	}
	p := l.p
	peer, wait := p.reach(l.t)
	var sl sleeper
	defer sl.close()
	if peer == nil {
		sl.sleep(ctx, p.scaled(wait))
		p.pullFailed(l.id, "prefill engine not reached")
		return "", errLoadFailed
	}
	if !sl.sleep(ctx, wait) {
		return "", errClientGone
	}
	ok, died := p.receive(g, peer, l.t.blocks, Pull{RequestID: l.id})
	if !ok {
		return died, errLoadFailed
	}
	peer.notify(l.id)
	return "", nil
}

// done gives a handle to a prefill that its token limit ended; one that a stop ended is freed, without a handle.
func (l *moriioLeg) done(_ context.Context, g *group) (member string, value json.RawMessage, err error) {
	q, p := g.seqs[0], l.p
	if !l.prefill || q.finish != finishLength {
		return "", nil, nil
	}
	value = marshal(moriioHandle{
		DoRemotePrefill: true, BlockIDs: q.blocks, EngineID: p.id, Host: p.e.remoteHost(), HandshakePort: p.sidePort(),
		NotifyPort: firstNotifyPort + p.sidePort() - firstSidePort, DPSize: p.e.opts.Ranks, TPSize: p.e.opts.TPSize, TransferID: l.id,
	})
	p.keepFirst(g, l.id, p.e.timing.lease)
	return memberTransfer, value, nil
}

// left frees the prefill engine's blocks for a decode leg that the engine knew.
func (l *moriioLeg) left(g *group) {
	if l.prefill || g == nil {
		return
	}
	if peer := l.p.e.registry.byID(l.t.engineID); peer != nil {
		peer.free(l.id)
	}
}
