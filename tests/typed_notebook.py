"""The lines of the README, as a stranger's type checker sees them (mypy --strict); not run."""

import mirip_fast as mf

works = mf.embed("data/")  # every image once; instant the second time
model = mf.train(works)  # seconds
print(model.evaluate())  # on works that it has not seen
ranking = model.rank("folder/")  # a DataFrame, the best work first

print(ranking.head(), model.evaluate().pairwise_accuracy, works.features("cls").shape)
left_out = mf.PairwiseRanker().fit(works.features(), works.images["tier_score"]).left_out_
