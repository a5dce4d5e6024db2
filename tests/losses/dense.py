"""Independent reference: the formulas of the papers, dense, float64, written without the core."""

import torch


def target_matrix(labels):
    """Algorithm 1's TargetM with the sentinel -1: ones where labels agree."""
    n = len(labels)
    rows = []
    for i in range(n):
        rows.append(
            [float(i == j or (labels[i] != -1 and labels[i] == labels[j])) for j in range(n)]
        )
    return torch.tensor(rows, dtype=torch.float64)


def soft_cross_entropy(logits, target):
    """Algorithm 1's SoftCE: mean over rows of -sum(t log softmax(s)) / sum(t)."""
    log_probability = (
        logits
        - torch.log(torch.exp(logits - logits.amax(1, keepdim=True)).sum(1, keepdim=True))
        - logits.amax(1, keepdim=True)
    )
    return (-(target * log_probability).sum(1) / target.sum(1)).mean()


def unicl(image, text, labels, scale):
    """UniCL, Algorithm 1 of arXiv 2204.03610, in float64."""
    logits = scale * image @ text.T
    target = target_matrix(labels.tolist())
    return 0.5 * (soft_cross_entropy(logits, target) + soft_cross_entropy(logits.T, target.T))


def value_and_gradients(function, image, text, labels, scale):
    """(loss, d image, d text, d scale) of `function` on float64 copies of the arguments."""
    image, text, scale = (
        t.detach().double().clone().requires_grad_() for t in (image, text, scale)
    )
    loss = function(image, text, labels, scale)
    return (loss.detach(), *torch.autograd.grad(loss, (image, text, scale)))


def supcon(first, second, labels, temperature):
    """SupCon L_out (arXiv 2004.11362), by loops over anchors."""
    z = torch.cat([first, second]).double()
    y = list(labels) * 2
    n = len(labels)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(2 * n):
        others = [a for a in range(2 * n) if a != i]
        same = [p for p in others if p % n == i % n or (y[p] == y[i] and y[i] != -1)]
        similarity = {a: torch.dot(z[i], z[a]) / temperature for a in others}
        normaliser = torch.logsumexp(torch.stack(list(similarity.values())), 0)
        total = total + sum(normaliser - similarity[p] for p in same) / len(same)
    return total / (2 * n)


def moco(query, key, negatives, temperature):
    """MoCo (arXiv 1911.05722, equation 1) with the keys (M, D) that the queue holds, by loops."""
    total = 0
    for q, k in zip(query.double(), key.double(), strict=True):
        scores = [torch.dot(q, other) / temperature for other in [k, *negatives.double()]]
        total = total + torch.logsumexp(torch.stack(scores), 0) - scores[0]
    return total / len(query)


def nt_xent(first, second, temperature):
    """SimCLR (arXiv 2002.05709, equation 1), the mean over all views, from all cosines."""
    views = torch.cat([first, second]).double()
    logits = views @ views.T / temperature
    others = logits.masked_fill(torch.eye(len(views), dtype=torch.bool), float("-inf"))
    partner = torch.arange(len(views)).roll(len(first))
    return (others.logsumexp(1) - logits[torch.arange(len(views)), partner]).mean()
